# What the scripts of label, fit and report share. They source it; their arguments are RUN and flags of `batchjob`.
set -uo pipefail
RUN=$1
shift
flags=("$@")
# A task of an array is named ID_INDEX: its plain job id may stand for another task, or for the whole array.
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then key=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}; else key=$SLURM_JOB_ID; fi
say() { echo "$(date '+%F %T') job $key (attempt ${SLURM_RESTART_COUNT:-0}): $*"; }

# $stopped holds the signal that this script received: USR1, TERM or nothing. The traps are set first, since a cancel
# may come before the first srun.
stopped='' step='' is_leaving=''
on_signal() {
  [ -z "$is_leaving" ] || return 0
  if [ "$1" = TERM ]; then stopped=TERM; else stopped=${stopped:-USR1}; fi
  say "$2"
  [ -z "$step" ] || kill "-$1" "$step" 2>/dev/null
}
trap 'on_signal USR1 "SIGUSR1: the time limit is near, or a preemption"' USR1
told_to_end='SIGTERM, told to end: cancelled (submit again to go on), or preempted (Slurm brings it back)'
trap 'on_signal TERM "$told_to_end"' TERM INT # said at once: Slurm may end the script while it waits for srun

. "$BATCHJOB_HOME/slurm/site.sh"
site_environment || exit 2
mkdir -p "$BATCHJOB_SCRATCH" 2>/dev/null || true
if [ ! -f "$RUN/plan.json" ]; then
  say "no plan.json in $RUN on $(hostname -s): it was deleted, or is on a file system that this node does not see"
  exit 2
fi

# The progress of an attempt is what exists at its end and did not exist at its beginning. Each kind of job defines
# `kept`, which prints what the job leaves for the next attempt, as sorted lines. No times are compared, since clocks
# jump.
before=$RUN/work/before-$key
ends=$RUN/work/ends-$key
mkdir -p "$RUN/work"
begin_attempt() { kept >"$before"; }
newly_kept() { kept | LC_ALL=C comm -13 "$before" -; }
progress() { newly_kept | wc -l; }
counted() { echo "$1 $2$([ "$1" = 1 ] || echo s)"; } # NUMBER NOUN: 1 partition, 2 partitions
published() { find "$RUN/done" -name '[0-9]*.json' 2>/dev/null | wc -l; }
more_time="give more time (BATCHJOB_TIME in slurm/site.sh), or plan with fewer --rows-per-partition"

# run_step SRUN-FLAGS… -- ARGUMENTS of batchjob…: runs a step and returns its exit code; its tasks write their own to
# $ends. bash runs a trap only after a foreground command ends, so srun runs in the background, and signals interrupt
# `wait`.
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
  [ -z "$stopped" ] || kill -TERM "$step" 2>/dev/null # the signal came between the two lines above
  while :; do
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
  done
  step=
  return $code
}

# nodes_of CODES: prints the nodes, comma-separated, where a task ended with one of the codes (a pattern of grep).
nodes_of() { cat "$ends"/* 2>/dev/null | grep -Ex "($1) .*" | cut -d' ' -f2 | sort -u | paste -sd,; }

# end_if_hopeless CODE: ends the job if another attempt cannot help, and says why.
end_if_hopeless() {
  local nodes
  if [ -z "$(ls "$ends" 2>/dev/null)" ]; then
    sleep 2 & wait $! # on a cancel, Slurm may refuse srun a moment before the signal arrives
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

# Counts the attempts in a row that finished nothing, this one included, in a file below RUN. Prints 0 if this one did.
attempts_without_progress() {
  local file=$RUN/work/stalled-$key count=0
  if [ "$(progress)" = 0 ]; then count=$(($(cat "$file" 2>/dev/null || echo 0) + 1)); fi
  echo "$count" | tee "$file"
}

# Waits at most ten minutes until Slurm ends this script.
await_the_end() {
  local until=$((SECONDS + 600))
  while [ "$SECONDS" -lt "$until" ]; do sleep 5 & wait $!; done
}

# requeue_or_end: ends the job after a signal. After USR1 (time limit, preemption) the job goes back into the queue.
# After TERM it does not, since that would start a cancelled job again; Slurm itself requeues a preempted job after its
# grace time.
requeue_or_end() {
  if [ "$stopped" = USR1 ]; then
    if [ "$(attempts_without_progress)" -ge 3 ]; then
      say "three attempts in a row were stopped before they finished anything: not requeued; $more_time"
      exit 75
    fi
    is_leaving=yes # a signal from now on comes from the requeue
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
  say "$(counted "$(published)" partition) published"
  # does not exit yet: a job that ends within the grace time of a preemption counts as finished and is not requeued
  await_the_end
  exit 75
}
