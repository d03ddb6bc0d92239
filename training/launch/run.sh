#!/bin/bash
# torchrun, for the launch files beside:
#
#     run.sh OUTPUT ARGUMENTS_OF_TORCHRUN...
#
# It passes SIGTERM on, and ends with 143 when it was told to stop, here or on another machine, and the run did not fail
# for a reason of its own: torchrun then ends with 1, as it does after any failure. A worker that is gone without that
# (killed for want of memory, say) makes torchrun stop the others, which look preempted; that is a failure.
set -u
status="$1/status.json"
asked="$1/.asked-to-stop" # seen by all machines, as the folder is
failed="$1/.failed"
mkdir -p "$1"
shift

mark() { # $1: states, with | between them; $2: the one in their place
    new="${status%/*}/.status.json.$HOSTNAME.$$" # other machines may do the same
    sed -E "s/\"state\": \"($1)\"/\"state\": \"$2\"/" "$status" >"$new" &&
        grep -Eq "\"state\": \"($1)\"" "$status" && mv -f "$new" "$status"
    rm -f "$new"
}

# The marks of another time say nothing about this one.
[ -f "$status" ] && mark 'preempted|failed' waiting
rm -f "$asked" "$failed"

set -m # a process group of its own: a signal to the group of this shell reaches torchrun once, from here
torchrun "$@" &
child=$!
told=no
trap 'trap "" TERM; told=yes; : >"$asked"; kill -TERM "$child"' TERM
trap 'told=yes; : >"$asked"; kill -INT "$child"' INT
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # the signal ended the waiting, not the child
    wait "$child"
    code=$?
done
[ "$code" -eq 0 ] && exit 0
[ "$code" -eq 143 ] && code=1 # torchrun ended by the signal itself; whether that is a preemption is decided here
if [ "$told" = no ] && [ ! -e "$asked" ]; then
    : >"$failed" # before any other machine is told to stop because this one failed
    [ -f "$status" ] && mark 'running|preempted' failed
    exit "$code"
fi
[ -e "$failed" ] && exit "$code"
grep -q '"state": "failed"' "$status" 2>/dev/null && exit "$code"
exit 143
