#!/bin/bash
# task.sh ENDS COMMAND…: one task of a step. Runs the command and writes to ENDS/RANK how it ended, and where. srun tells
# only the highest of all codes, and 2 both for a task's wrong input and for a program that is not there.
ends=$1
shift
own=$ends/${SLURM_PROCID:-0}
node=${SLURMD_NODENAME:-$(hostname -s)}
echo "started $node" >"$own"
trap : USR1 TERM INT # meant for the command, which has them too; this only waits for its end
"$@"
code=$?
echo "$code $node" >"$own"
exit $code
