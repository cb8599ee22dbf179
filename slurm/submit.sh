#!/usr/bin/env bash
# slurm/submit.sh DATA [RUN] [options of `batchjob plan`] [-- runtime options]: checks everything on the login node,
# then queues label (after fit, with --scope dataset) and report: all jobs or none. The environment gives the shape:
#   NODES=1, GPUS=1 (for each node; 0: CPUs), TASKS=1 (for each node, with GPUS=0), ARRAY= (tasks of a job array, each
#   of that shape)
set -euo pipefail
shopt -s inherit_errexit
BATCHJOB_HOME=$(cd "$(dirname "$0")/.." && pwd)
export BATCHJOB_HOME
. "$BATCHJOB_HOME/slurm/site.sh"
. "$BATCHJOB_HOME/slurm/nodes.sh"
fail() { echo "submit: $*" >&2; exit 2; }

[ -n "${1:-}" ] || fail "no DATA given; usage: make submit DATA=/coco NODES=2 GPUS=4, or slurm/submit.sh DATA [RUN] [options]"
data=$1
shift
run='' plan=() retry='' runtime=()
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then run=$1; shift; fi
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  if [ "$1" = --retry-failed ]; then retry=$1; else plan+=("$1"); fi
  shift
done
[ $# = 0 ] || runtime=("${@:2}")
nodes=${NODES:-1} gpus=${GPUS:-1} array=${ARRAY:-} tasks=${TASKS:-1}
for number in "$nodes" "$gpus" "$tasks" "${array:-1}"; do
  [[ $number =~ ^[0-9]+$ ]] || fail "'$number' is not a number; NODES, GPUS, TASKS and ARRAY are counts"
done
[ "$nodes" -ge 1 ] && [ "$tasks" -ge 1 ] || fail "NODES=$nodes, TASKS=$tasks: a job has 1 or more of each"
[ "$gpus" = 0 ] || tasks=$gpus
# If GPUs were asked for, a task that cannot use one must fail and not label on the CPU.
[[ " ${runtime[*]-}" == *" --device"* ]] || runtime+=(--device "$([ "$gpus" -gt 0 ] && echo cuda || echo cpu)")
command -v sbatch >/dev/null || fail "no sbatch here: this is not a login node of a Slurm cluster; without one: batchjob run"

time=$(fit_time "$BATCHJOB_TIME" "$BATCHJOB_PARTITION" BATCHJOB_TIME)
counted=$([ "$BATCHJOB_GPU_FLAG" = gres ] && echo "$gpus" || echo 0)
size=$(fit_size "$BATCHJOB_PARTITION" "$nodes" "$tasks" "$counted" "$BATCHJOB_CPUS_PER_GPU" "$BATCHJOB_MEM_PER_GPU" \
  BATCHJOB_ _PER_GPU)
report_time=$(fit_time "$BATCHJOB_REPORT_TIME" "$BATCHJOB_REPORT_PARTITION" BATCHJOB_REPORT_TIME)
report_size=$(fit_size "$BATCHJOB_REPORT_PARTITION" 1 1 0 "$BATCHJOB_REPORT_CPUS" "$BATCHJOB_REPORT_MEM" BATCHJOB_REPORT_)

# The login node has internet and the compute nodes do not, so weights, data and environment are checked before the job
# waits in the queue. `plan` fetches the weights, reads the data and writes the plan; it refuses a RUN with another
# plan.
site_environment
unset HF_HUB_OFFLINE
[ "$gpus" -gt 0 ] && export BATCHJOB_PLAN_FOR_GPU=1
"$BATCHJOB_PYTHON" -c 'import batchjob' || fail "$BATCHJOB_PYTHON can't import batchjob; run: make env"
run=$("$BATCHJOB_PYTHON" -m batchjob plan "$data" ${run:+"$run"} ${plan[@]+"${plan[@]}"} | tail -n 1)
run=$(realpath "$run")
case $run in *\\*) fail "RUN $run has a backslash, which Slurm takes out of the names of logs; choose another RUN" ;; esac
facts=$("$BATCHJOB_PYTHON" -c '
import json, sys
from pathlib import Path
from batchjob import plan
found = plan.load(Path(sys.argv[1]))
path = found.weights.get("path", "")
if path and not Path(path).exists():
    sys.exit(f"the weights are not at {path}")
print(found.options.scope, path)' "$run") || fail "$run cannot be read back"
scope=${facts%% *} weights=${facts#* }
for path in "$run" ${weights:+"$weights"} "$(realpath -m "$data")"; do
  case $path in
    /tmp/* | /var/tmp/* | /dev/shm/* | "${TMPDIR:-/tmp}"/*)
      echo "submit: $path looks local to this machine; compute nodes must see it too" >&2 ;;
  esac
done
mkdir -p "$run/logs"

common=(--export=ALL --signal="B:USR1@$BATCHJOB_WARN_S" ${BATCHJOB_ACCOUNT:+--account="$BATCHJOB_ACCOUNT"}
  ${BATCHJOB_EXTRA[@]+"${BATCHJOB_EXTRA[@]}"})
shape=("${common[@]}" ${BATCHJOB_PARTITION:+--partition="$BATCHJOB_PARTITION"} --time="$time" --nodes="$nodes"
  --ntasks-per-node="$tasks" --cpus-per-task="${size% *}" --mem="$((${size#* } * tasks))M")
[ "$gpus" -gt 0 ] && [ "$BATCHJOB_GPU_FLAG" = gres ] && shape+=(--gres="gpu:${BATCHJOB_GPU_TYPE:+$BATCHJOB_GPU_TYPE:}$gpus")
alone=("${common[@]}" ${BATCHJOB_REPORT_PARTITION:+--partition="$BATCHJOB_REPORT_PARTITION"} --time="$report_time"
  --cpus-per-task="${report_size% *}" --mem="${report_size#* }M")
judge=()
for i in ${runtime[@]+"${!runtime[@]}"}; do
  case ${runtime[i]} in --max-failures) judge=("${runtime[@]:i:2}") ;; --max-failures=*) judge=("${runtime[i]}") ;; esac
done

scratch=$(mktemp -d)
ids=() lines=() is_complete=''
clean_up() { # all of the jobs, or none
  local code=$?
  rm -rf "$scratch"
  if [ -z "$is_complete" ] && [ ${#ids[@]} -gt 0 ]; then
    scancel "${ids[@]}" || true
    echo "submit: cancelled what was queued already: ${ids[*]}" >&2
  fi
  exit $code
}
trap clean_up EXIT
trap 'exit 75' INT TERM

# refused NAME: fails with sbatch's lines, and names the setting of site.sh to check
refused() {
  local lines hint
  lines=$(cat "$scratch/error")
  case $(tr A-Z a-z <<<"$lines") in
    *policy* | *qos*limit* | *submit*limit* | *assoc*) hint="how many jobs you have queued (squeue --me), or BATCHJOB_EXTRA" ;;
    *account*) hint="BATCHJOB_ACCOUNT (now '$BATCHJOB_ACCOUNT')" ;;
    *qos*) hint="--qos in BATCHJOB_EXTRA (now '${BATCHJOB_EXTRA[*]-}')" ;;
    *partition*) hint="BATCHJOB_PARTITION (now '$BATCHJOB_PARTITION'; here are: $(sinfo -h -o %R | sort -u | paste -sd' '))" ;;
    *gres* | *gpu*) hint="BATCHJOB_GPU_TYPE (now '$BATCHJOB_GPU_TYPE'), BATCHJOB_GPU_FLAG, or GPUS=$gpus" ;;
    *time*limit*) hint="BATCHJOB_TIME (now '$time')" ;;
    *configuration* | *cpu* | *memory* | *node*) hint="BATCHJOB_CPUS_PER_GPU, BATCHJOB_MEM_PER_GPU, BATCHJOB_GPU_TYPE, or ask for less" ;;
    *contact* | *connect* | *timed?out*) hint="whether Slurm runs (scontrol ping), and submit again; nothing of it" ;;
    *) hint="what it names" ;;
  esac
  fail "sbatch refused the $1 job: $(tr '\n' ' ' <<<"$lines" | sed 's/ *$//'); check $hint in slurm/site.sh"
}

# ask NAME SBATCH-FLAGS…: fails if Slurm would refuse such a job. Says so if no node that is up now could run it.
ask() {
  local name=$1
  shift
  sbatch --test-only "$@" "$BATCHJOB_HOME/slurm/$name.sbatch" >/dev/null 2>"$scratch/error" && return 0
  # nodes_in also counts drained nodes, which may come back; sbatch does not
  grep -q "node configuration is not available" "$scratch/error" || refused "$name"
  [ -n "$(nodes_in "$BATCHJOB_PARTITION")" ] && [ ${#BATCHJOB_EXTRA[@]} = 0 ] || refused "$name"
  echo "submit: no nodes that are up now could run the $name job; it waits until some come back (sinfo shows them)" >&2
}

# queue NAME SBATCH-FLAGS… -- ARGUMENTS: queues a job and leaves its id in $id.
queue() {
  local name=$1 given=()
  shift
  while [ "$1" != -- ]; do given+=("$1"); shift; done
  shift
  id=$(sbatch --parsable "${given[@]}" "$BATCHJOB_HOME/slurm/$name.sbatch" "$run" "$@" 2>"$scratch/error") || refused "$name"
  cat "$scratch/error" >&2
  id=${id%%;*}
  [[ $id =~ ^[0-9]+$ ]] || { echo "no job id, but '$id'" >>"$scratch/error"; refused "$name"; }
  ids+=("$id")
  lines+=("$id $name")
}

[ "$scope" != dataset ] || ask fit "${shape[@]}"
ask label "${shape[@]}" ${array:+--array="0-$((array - 1))"}
ask report "${alone[@]}"
[ -z "$retry" ] || "$BATCHJOB_PYTHON" -m batchjob plan "$data" "$run" "$retry" ${plan[@]+"${plan[@]}"} >/dev/null
logs=${run//%/%%}/logs # Slurm reads % as the start of a placeholder there
after=() said=()
if [ "$scope" = dataset ]; then
  queue fit "${shape[@]}" --output="$logs/fit-%j.log" -- "${runtime[@]}"
  after=(--dependency="afterok:$id")
  said+=("fit     job $id: $nodes nodes × $tasks tasks")
fi
if [ -n "$array" ]; then
  queue label "${shape[@]}" ${after[@]+"${after[@]}"} --array="0-$((array - 1))" --output="$logs/label-%A_%a.log" -- "${runtime[@]}"
  kind=afterany # if a task died, the report job still runs and lists the missing partitions
else
  queue label "${shape[@]}" ${after[@]+"${after[@]}"} --output="$logs/label-%j.log" -- "${runtime[@]}"
  kind=afterok
fi
said+=("label   job $id: ${array:+$array × }$nodes nodes × $tasks tasks of ${size% *} CPUs and ${size#* } MB, at most $time each attempt")
queue report "${alone[@]}" --dependency="$kind:$id" --output="$logs/report-%j.log" -- ${judge[@]+"${judge[@]}"}
said+=("report  job $id")
printf '%s\n' "${lines[@]}" >>"$run/logs/jobs.txt"
is_complete=yes
printf '%s\n' "${said[@]}" "run     $run" "watch   make status RUN=$(printf %q "$run")"
