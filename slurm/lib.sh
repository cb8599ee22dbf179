# What label, fit and report have in common. Sourced by them; their arguments are RUN and flags of `batchjob`.
set -uo pipefail
RUN=$1
shift
flags=("$@")
# An array's task is ID_INDEX: its plain job id would be another task's, or the whole array.
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then key=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}; else key=$SLURM_JOB_ID; fi
say() { echo "$(date '+%F %T') job $key (attempt ${SLURM_RESTART_COUNT:-0}): $*"; }

# What came to us is in $stopped (USR1, TERM or nothing), from the first line on: a cancel may come before the first srun.
stopped='' step='' is_leaving=''
on_signal() {
  [ -z "$is_leaving" ] || return 0
  if [ "$1" = TERM ]; then stopped=TERM; else stopped=${stopped:-USR1}; fi
  say "$2"
  [ -z "$step" ] || kill "-$1" "$step" 2>/dev/null
}
trap 'on_signal USR1 "SIGUSR1: the time limit is near, or a preemption"' USR1
trap 'on_signal TERM SIGTERM' TERM INT

. "$BATCHJOB_HOME/slurm/site.sh"
site_environment || exit 2
mkdir -p "$BATCHJOB_SCRATCH" 2>/dev/null || true
if [ ! -f "$RUN/plan.json" ]; then
  say "no plan.json in $RUN on $(hostname -s): it was deleted, or is on a file system that this node does not see"
  exit 2
fi

# Progress of an attempt is what is kept at its end and was not at its beginning. Each kind of job says in `kept` what it
# leaves for the next attempt, a sorted line for each thing. No times are compared, since clocks jump.
before=$RUN/work/before-$key
ends=$RUN/work/ends-$key
mkdir -p "$RUN/work"
begin_attempt() { kept >"$before"; }
newly_kept() { kept | LC_ALL=C comm -13 "$before" -; }
progress() { newly_kept | wc -l; }
published() { find "$RUN/done" -name '[0-9]*.json' 2>/dev/null | wc -l; }
more_time="give more time (BATCHJOB_TIME in slurm/site.sh), or plan with fewer --rows-per-partition"

# run_step SRUN-FLAGS… -- ARGUMENTS of batchjob…: the exit code of the step, whose tasks leave their own in $ends.
# bash runs a trap only after a foreground command, so srun runs in the background and `wait` is what signals interrupt.
run_step() {
  local code spread=()
  while [ "$1" != -- ]; do spread+=("$1"); shift; done
  shift
  rm -rf "$ends"
  mkdir -p "$ends"
  [ -z "$stopped" ] || return 75
  # since Slurm 22.05 a step does not inherit the job's CPUs per task, and a bound task would have one core
  srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "${spread[@]}" bash "$BATCHJOB_HOME/slurm/task.sh" "$ends" "$BATCHJOB_PYTHON" -m batchjob "$@" &
  step=$!
  [ -z "$stopped" ] || kill -TERM "$step" 2>/dev/null # it came between the two lines above
  while :; do
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
  done
  step=
  return $code
}

# nodes_of CODES: the nodes, comma-separated, where a task ended with one of the codes (a pattern of grep).
nodes_of() { cat "$ends"/* 2>/dev/null | grep -Ex "($1) .*" | cut -d' ' -f2 | sort -u | paste -sd,; }

# end_if_hopeless CODE: ends the job where trying again can't help; each ending has its own true sentence.
end_if_hopeless() {
  local nodes
  if [ -z "$(ls "$ends" 2>/dev/null)" ]; then
    sleep 2 & wait $! # srun may be refused by a cancel a moment before its signal is here
    [ -z "$stopped" ] || requeue_or_end
    say "srun could not start the tasks (its exit $1, its line is above): not tried again; does every node see" \
      "$BATCHJOB_HOME and $RUN?"
    exit 1
  fi
  nodes=$(nodes_of 2)
  if [ -n "$nodes" ]; then say "the input is wrong (exit 2 on $nodes), see above: not tried again"; exit 2; fi
  nodes=$(nodes_of '126|127')
  if [ -n "$nodes" ] && [ -z "$(nodes_of '0|75')" ]; then
    say "there is no Python at $BATCHJOB_PYTHON on $nodes: not tried again; make env, or set BATCHJOB_PYTHON in" \
      "slurm/site.sh to one that the nodes see"
    exit 1
  fi
}

# How many attempts in a row finished nothing, this one included (0 if it did), kept beside RUN.
attempts_without_progress() {
  local file=$RUN/work/stalled-$key count=0
  if [ "$(progress)" = 0 ]; then count=$(($(cat "$file" 2>/dev/null || echo 0) + 1)); fi
  echo "$count" | tee "$file"
}

# Waits to be ended by Slurm, ten minutes at most.
await_the_end() {
  local until=$((SECONDS + 600))
  while [ "$SECONDS" -lt "$until" ]; do sleep 5 & wait $!; done
}

# requeue_or_end: what follows a signal. USR1 (time limit, preemption): back into the queue. TERM: never, since
# that would bring a cancelled job back to life; a preempted job is requeued by Slurm itself once its grace is over.
requeue_or_end() {
  if [ "$stopped" = USR1 ]; then
    if [ "$(attempts_without_progress)" -ge 3 ]; then
      say "three attempts in a row were stopped before they finished anything: not requeued; $more_time"
      exit 75
    fi
    is_leaving=yes # what ends this script from now on is the requeue
    say "stopped with work left: back into the queue; what is published stays"
    if scontrol requeue "$key"; then
      await_the_end
      say "Slurm took the requeue and did not end this job in ten minutes: submit again, if it is gone from the queue"
    else
      say "Slurm did not take the requeue (its line is above): submit again to go on"
    fi
    exit 75
  fi
  is_leaving=yes
  say "told to end: cancelled (submit again to go on), or preempted (Slurm brings it back);" \
    "$(published) partitions are published"
  # not exit: a job that ends within the grace of a preemption counts as finished and would not be requeued
  await_the_end
  exit 75
}
