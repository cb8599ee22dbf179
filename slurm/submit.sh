#!/usr/bin/env bash
# slurm/submit.sh DATA [RUN] [options of `batchjob plan`]: checks everything here, on the login node, then queues
# label (after fit, with --scope dataset) and report. Shape of the job, from the environment:
#   NODES=1 GPUS=1 (of each node; 0: CPUs)  ARRAY= (tasks of a job array, each of NODES × GPUS)  FLAGS= (runtime options)
set -euo pipefail
BATCHJOB_HOME=$(cd "$(dirname "$0")/.." && pwd)
export BATCHJOB_HOME
. "$BATCHJOB_HOME/slurm/site.sh"
fail() { echo "submit: $*" >&2; exit 2; }

[ -n "${1:-}" ] || fail "no DATA given; usage: make submit DATA=/coco NODES=2 GPUS=4, or slurm/submit.sh DATA [RUN] [options]"
data=$1
shift
run=
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then run=$1; shift; fi
nodes=${NODES:-1} gpus=${GPUS:-1} array=${ARRAY:-} flags=${FLAGS:-}
tasks=$((gpus > 0 ? gpus : ${TASKS:-1}))
for number in "$nodes" "$gpus" "${array:-1}"; do
  [[ $number =~ ^[0-9]+$ ]] || fail "'$number' is no number; NODES, GPUS and ARRAY are counts"
done
[ "$nodes" -ge 1 ] || fail "NODES=$nodes is no number of nodes; give 1 or more"
command -v sbatch >/dev/null || fail "no sbatch here: this is no login node of a Slurm cluster; without one: batchjob run"

# Here there is internet, on the compute nodes there is none: weights, data and environment are looked at before the
# job waits in the queue. `plan` fetches the weights, reads the data and writes the plan; it is refused if RUN differs.
site_environment
unset HF_HUB_OFFLINE
[ "$gpus" -gt 0 ] && export BATCHJOB_PLAN_FOR_GPU=1
"$BATCHJOB_PYTHON" -c 'import batchjob' || fail "$BATCHJOB_PYTHON can't import batchjob; run: make env"
run=$("$BATCHJOB_PYTHON" -m batchjob plan "$data" ${run:+"$run"} "$@" | tail -n 1)
run=$(realpath "$run")
weights=$("$BATCHJOB_PYTHON" -c '
import sys
from pathlib import Path
from batchjob import plan
found = plan.load(Path(sys.argv[1]))
path = found.weights.get("path", "")
if path and not Path(path).exists():
    sys.exit(f"the weights are not at {path}")
print(path, found.options.scope)' "$run") || fail "$run cannot be read back"
scope=${weights##* } weights=${weights% *}
for path in "$run" ${weights:+"$weights"} "$(realpath -m "$data")"; do
  case $path in
    /tmp/* | /var/tmp/* | /dev/shm/* | "${TMPDIR:-/tmp}"/*)
      echo "submit: $path looks local to this machine; compute nodes must see it too" >&2 ;;
  esac
done
mkdir -p "$run/logs"

shape=(--nodes="$nodes" --ntasks-per-node="$tasks" --time="$BATCHJOB_TIME" --signal="B:USR1@$BATCHJOB_WARN_S"
  --cpus-per-task="$BATCHJOB_CPUS_PER_GPU")
case $BATCHJOB_MEM_PER_GPU in
  0 | "") ;;
  *) unit=${BATCHJOB_MEM_PER_GPU##*[0-9]} && shape+=(--mem="$((${BATCHJOB_MEM_PER_GPU%%[!0-9]*} * tasks))$unit") ;;
esac
[ "$gpus" -gt 0 ] && [ "$BATCHJOB_GPU_FLAG" = gres ] && shape+=(--gres="gpu:${BATCHJOB_GPU_TYPE:+$BATCHJOB_GPU_TYPE:}$gpus")
place=(${BATCHJOB_PARTITION:+--partition="$BATCHJOB_PARTITION"} ${BATCHJOB_ACCOUNT:+--account="$BATCHJOB_ACCOUNT"}
  ${BATCHJOB_EXTRA[@]+"${BATCHJOB_EXTRA[@]}"})
export RUN=$run BATCHJOB_LABEL_FLAGS=$flags

queue() { # queue NAME SBATCH-FLAGS…: prints the job's id and writes it down for status and cancel
  local name=$1 id
  shift
  id=$(sbatch --parsable --export=ALL "${place[@]}" "$@" "$BATCHJOB_HOME/slurm/$name.sbatch")
  id=${id%%;*}
  echo "$id $name" >>"$run/logs/jobs.txt"
  echo "$id"
}

after=()
if [ "$scope" = dataset ]; then
  id=$(queue fit "${shape[@]}" --output="$run/logs/fit-%j.log")
  after=(--dependency="afterok:$id")
  echo "fit     job $id: $nodes nodes × $tasks tasks"
fi
if [ -n "$array" ]; then
  id=$(queue label "${shape[@]}" ${after[@]+"${after[@]}"} --array="0-$((array - 1))" --output="$run/logs/label-%A_%a.log")
  kind=afterany # where a task died, report is what lists the holes
else
  id=$(queue label "${shape[@]}" ${after[@]+"${after[@]}"} --output="$run/logs/label-%j.log")
  kind=afterok
fi
echo "label   job $id: ${array:+$array × }$nodes nodes × $tasks tasks"
id=$(queue report --time="$BATCHJOB_TIME" --dependency="$kind:$id" --output="$run/logs/report-%j.log")
echo "report  job $id"
echo "run     $run"
echo "watch   make status RUN=$run"
