#!/bin/bash
# task.sh ENDS COMMAND…: runs one task of a step, and writes its exit code and node to ENDS/RANK. srun reports only the
# highest exit code of all tasks, and reports 2 both for wrong input and for a program that does not exist.
ends=$1
shift
own=$ends/${SLURM_PROCID:-0}
node=${SLURMD_NODENAME:-$(hostname -s)}
echo "started $node" >"$own"
trap : USR1 TERM INT # the command gets these signals too and acts on them; this script only waits for its end
"$@"
code=$?
echo "$code $node" >"$own"
exit $code
