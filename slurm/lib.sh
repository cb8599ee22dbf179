# What label, fit and report have in common. Sourced by them with RUN and BATCHJOB_HOME in the environment.
set -uo pipefail
. "$BATCHJOB_HOME/slurm/site.sh"
site_environment || exit 2
mkdir -p "$BATCHJOB_SCRATCH" 2>/dev/null || true

# An array's task is ID_INDEX: its plain job id would be another task's, or the whole array.
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then key=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}; else key=$SLURM_JOB_ID; fi

say() { echo "$(date '+%F %T') job $key (attempt ${SLURM_RESTART_COUNT:-0}): $*"; }

# Everything that a job publishes says so in its done-marker: other tasks' progress is no reason to try this one again.
stamp=$RUN/work/stamp-$key
mkdir -p "$RUN/work"
begin_attempt() { : >"$stamp"; }
progress() {
  find "$RUN/done" -name '[0-9]*.json' -newer "$stamp" -exec grep -l "\"slurm-$SLURM_JOB_ID\"" {} + 2>/dev/null | wc -l
}
published() { find "$RUN/done" -name '[0-9]*.json' 2>/dev/null | wc -l; }

# run_step SRUN-FLAGS… COMMAND…: the exit code of the step; what came to us meanwhile is in $stopped (USR1, TERM or nothing).
# bash runs a trap only after a foreground command, so srun runs in the background and `wait` is what signals interrupt.
stopped=
run_step() {
  srun "$@" &
  local step=$! code
  trap 'stopped=${stopped:-USR1}; say "SIGUSR1: the time limit is near, or a preemption"; kill -USR1 $step 2>/dev/null' USR1
  trap 'stopped=TERM; say "SIGTERM"; kill -TERM $step 2>/dev/null' TERM INT
  while :; do
    wait $step
    code=$?
    kill -0 $step 2>/dev/null || break
  done
  trap - USR1 TERM INT
  trap 'stopped=${stopped:-USR1}' USR1
  trap 'stopped=TERM' TERM INT
  return $code
}

# How many attempts in a row finished nothing, this one included (0 if it did), kept beside RUN.
attempts_without_progress() {
  local file=$RUN/work/stalled-$key count=0
  if [ "$(progress)" = 0 ]; then count=$(($(cat "$file" 2>/dev/null || echo 0) + 1)); fi
  echo "$count" | tee "$file"
}

# requeue_or_end: what follows a signal. USR1 (time limit, preemption): back into the queue. TERM: never, since
# that would bring a cancelled job back to life; a preempted job is requeued by Slurm itself once its grace is over.
requeue_or_end() {
  if [ "$stopped" = USR1 ]; then
    if [ "$(attempts_without_progress)" -ge 3 ]; then
      say "three attempts in a row were stopped before they finished anything: not requeued; give more time, or plan with" \
        "fewer --rows-per-partition"
      exit 75
    fi
    say "stopped with work left: back into the queue; what is published stays"
    if scontrol requeue "$key"; then sleep 600 & wait; fi
    say "this cluster requeues no job: submit again to go on"
    exit 75
  fi
  say "told to end (cancelled, or preempted): $(published) partitions are published; submit again to go on"
  # not exit: a job that ends within the grace of a preemption counts as finished and would not be requeued
  sleep 600 & wait
  exit 75
}
