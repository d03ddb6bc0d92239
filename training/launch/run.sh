#!/bin/bash
# Run torchrun for the launch files in this folder:
#
#     run.sh OUTPUT ARGUMENTS_OF_TORCHRUN...
#
# Forwards SIGTERM, and exits with 143 if it was told to stop, here or on another machine, and the run did not fail by
# itself; torchrun exits with 1 in that case, as after any failure. A worker that dies without such a request (out of
# memory, say) makes torchrun stop the others, which then look preempted; that counts as a failure.
set -u
status="$1/status.json"
asked="$1/.asked-to-stop" # visible to all machines, like the folder
failed="$1/.failed"
mkdir -p "$1"
shift

mark() { # $1: states, separated by |; $2: the state to replace them
    new="${status%/*}/.status.json.$HOSTNAME.$$" # other machines may be doing the same
    sed -E "s/\"state\": \"($1)\"/\"state\": \"$2\"/" "$status" >"$new" &&
        grep -Eq "\"state\": \"($1)\"" "$status" && mv -f "$new" "$status"
    rm -f "$new"
}

# Marks of an earlier run say nothing about this one.
[ -f "$status" ] && mark 'preempted|failed' waiting
rm -f "$asked" "$failed"

set -m # torchrun gets its own process group: a signal to this shell's group reaches it only once, from here
torchrun "$@" &
child=$!
told=no
trap 'trap "" TERM; told=yes; : >"$asked"; kill -TERM "$child"' TERM
trap 'told=yes; : >"$asked"; kill -INT "$child"' INT
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # the signal interrupted the wait, not the child
    wait "$child"
    code=$?
done
[ "$code" -eq 0 ] && exit 0
[ "$code" -eq 143 ] && code=1 # the signal itself killed torchrun; whether that is a preemption is decided here
if [ "$told" = no ] && [ ! -e "$asked" ]; then
    : >"$failed" # before any other machine is told to stop because this one failed
    [ -f "$status" ] && mark 'running|preempted' failed
    exit "$code"
fi
[ -e "$failed" ] && exit "$code"
grep -q '"state": "failed"' "$status" 2>/dev/null && exit "$code"
exit 143
