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
folder="$1"
shift
status="$folder/status.json"
job="${SLURM_JOB_ID:-}"
asked="$folder/.asked-to-stop$job" # visible to all machines, like the folder
failed="$folder/.failed$job"
mkdir -p "$folder"

free() { # what flock is to lock
    flock -w 30 -E 75 "$@"
    [ $? -ne 75 ] && return
    echo "run.sh: another job is writing to $folder; wait for it, or name another folder" >&2
    [ -n "$job" ] && : >"$failed" # srun now stops the other machines, which are not preempted
    exit 1
}

trap '[ -n "$job" ] && [ -e "$failed" ] && exit 1; exit 143' TERM USR1 USR2 HUP # while it waits
if command -v flock >/dev/null; then
    [[ " $* " =~ \ --node[-_]rank[\ =]+([0-9]+)\  ]]
    number="${SLURM_NODEID:-${BASH_REMATCH[1]:-}}"
    # The lock of a run that is under way cannot be that of this job on Slurm, where all machines of a job begin
    # together, nor on a machine that is known to be its first.
    [ -n "$job" ] || [ "$number" = 0 ] && [ -e "$folder/.lock" ] && free "$folder/.lock" true
    # One job at a time, from before it begins to train: Slurm's first machine tells, elsewhere each for itself, with
    # its number, as other machines may be pods with the same HOSTNAME.
    own="$folder/.job.$HOSTNAME.${number:-0}"
    [ -n "$job" ] && own="$folder/.job.slurm"
    if [ -z "$job" ] || [ "${number:-0}" = 0 ]; then
        { exec 9>>"$own"; } 2>/dev/null && free 9
    fi
fi

mark() { # $1: states, separated by |; $2: the state to replace them
    new="$folder/.status.json.$HOSTNAME.$$" # other machines may be doing the same
    sed -E "s/\"state\": \"($1)\"/\"state\": \"$2\"/" "$status" >"$new" &&
        grep -Eq "\"state\": \"($1)\"" "$status" && mv -f "$new" "$status"
    rm -f "$new"
}

# Marks of an earlier run say nothing about this one.
[ -f "$status" ] && mark 'preempted|failed' waiting
rm -f "$folder"/.asked-to-stop* "$folder"/.failed*

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
