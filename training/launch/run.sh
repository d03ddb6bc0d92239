#!/bin/bash
# torchrun, for the launch files beside:
#
#     run.sh OUTPUT ARGUMENTS_OF_TORCHRUN...
#
# It passes SIGTERM on, and ends with 143 when the run in OUTPUT says that it was told to stop and has its checkpoint, or
# when it was told so itself before the run could say anything: torchrun then ends with 1, as it does after any failure.
set -u
status="$1/status.json"
shift
preempted='"state": "preempted"'

# The mark of another time says nothing about this one.
[ -f "$status" ] && sed -i 's/"state": "\(preempted\|failed\)"/"state": "waiting"/' "$status"

set -m # a process group of its own: a signal to the group of this shell reaches torchrun once, from here
torchrun "$@" &
child=$!
told=no
trap 'trap "" TERM; told=yes; kill -TERM "$child"' TERM
trap 'kill -INT "$child"' INT
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # the signal ended the waiting, not the child
    wait "$child"
    code=$?
done
grep -q "$preempted" "$status" 2>/dev/null && exit 143
[ "$told" = yes ] && [ "$code" -ne 0 ] && ! grep -q '"state": "failed"' "$status" 2>/dev/null && exit 143
exit "$code"
