#!/bin/bash
# Run torchrun for the launch files in this folder:
#
#     run.sh OUTPUT ARGUMENTS_OF_TORCHRUN...
#
# Forwards SIGTERM, and sends it on SIGUSR1, SIGUSR2 and SIGHUP, with which schedulers and closed terminals ask. Exits
# with 143 if it was told to stop, here or on another machine, and the run did not fail by itself; torchrun exits with 1
# in that case, as after any failure. A worker that dies without such a request (out of memory, say) makes torchrun stop
# the others, which then look preempted; that counts as a failure.
set -u
status="$1/status.json"
job="${SLURM_JOB_ID:-}"
asked="$1/.asked-to-stop$job" # visible to all machines, like the folder
failed="$1/.failed$job"
mkdir -p "$1"
free() { # $1: the run's folder; the rest: what flock is to lock
    flock -w 30 -E 75 "${@:2}"
    [ $? -ne 75 ] && return
    echo "run.sh: another job is writing to $1; wait for it, or name another folder" >&2
    [ -n "$job" ] && : >"$failed" # srun now stops the other machines, which are not preempted
    exit 1
}

trap '[ -n "$job" ] && [ -e "$failed" ] && exit 1; exit 143' TERM # while it waits
if command -v flock >/dev/null; then
    # On Slurm, where all machines of a job begin together, none of them can have the lock of a run that is under way.
    [ -n "$job" ] && [ -e "$1/.lock" ] && free "$1" "$1/.lock" true
    # One job at a time, from before it begins to train: Slurm's first machine tells, elsewhere each for itself, with
    # its number, as other machines may be pods with the same HOSTNAME.
    own="$1/.job${job:+.slurm}"
    if [ -z "$job" ]; then
        own="$own.$HOSTNAME"
        [[ " $* " =~ \ --node[-_]rank[\ =]+([1-9][0-9]*)\  ]] && own="$own.${BASH_REMATCH[1]}"
    fi
    if [ "${SLURM_NODEID:-0}" = 0 ] && { : >>"$own"; } 2>/dev/null; then
        exec 9>>"$own"
        free "$1" 9
    fi
fi
shift

mark() { # $1: states, separated by |; $2: the state to replace them
    new="${status%/*}/.status.json.$HOSTNAME.$$" # other machines may be doing the same
    sed -E "s/\"state\": \"($1)\"/\"state\": \"$2\"/" "$status" >"$new" &&
        grep -Eq "\"state\": \"($1)\"" "$status" && mv -f "$new" "$status"
    rm -f "$new"
}

# Marks of an earlier run say nothing about this one.
[ -f "$status" ] && mark 'preempted|failed' waiting
rm -f "${status%/*}"/.asked-to-stop* "${status%/*}"/.failed*

set -m # torchrun gets its own process group: a signal to this shell's group reaches it only once, from here
# Slurm sends signals to all processes of a job, and those that torchrun does not know would kill it and its workers.
(
    trap '' USR1 USR2
    exec torchrun "$@"
) &
child=$!
told=no
trap 'trap "" TERM USR1 USR2 HUP; told=yes; : >"$asked"; kill -TERM "$child"' TERM USR1 USR2 HUP
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
