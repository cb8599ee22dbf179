#!/usr/bin/env bash
# slurm/jobs.sh status [RUN] | cancel RUN: shows or cancels the jobs that submit.sh queued for RUN. `status` without RUN
# shows those of the newest runs.
set -euo pipefail
verb=${1:-} run=${2:-}
BATCHJOB_HOME=$(cd "$(dirname "$0")/.." && pwd)
export BATCHJOB_HOME
. "$BATCHJOB_HOME/slurm/site.sh"
fail() { echo "jobs: $*" >&2; exit 2; }

# fact JOB NAME: prints a property of a job, also after its end; for an array, each value of its tasks once. Prints
# nothing if Slurm has forgotten the job.
fact() {
  scontrol -o show job "$1" 2>/dev/null | tr ' ' '\n' | sed -n "s/^$2=//p" | sort -u | paste -sd+
}

# state JOB: prints the state of a job, from the controller, which forgets a job minutes after its end, else from the
# accounting.
state() {
  local found
  found=$(fact "$1" JobState)
  [ -n "$found" ] || found=$(sacct -X -n -P -j "$1" -o State 2>/dev/null | cut -d' ' -f1 | sort -u | paste -sd+)
  echo "${found:-ended (Slurm has forgotten how)}"
}

# Prints a line for each job of the last submit, and explains states that need it. A job without a log that Slurm itself
# cancelled was dropped, since the job before it failed.
describe_jobs() {
  local id name now before='' before_state='' log
  while read -r id name; do
    now=$(state "$id")
    log=$(find "$run/logs" -name "$name-$id*.log" -print -quit)
    case $now in
      *PENDING*) now+=" ($(fact "$id" Reason))" ;;
      *FAILED*) now+=" (exit $(fact "$id" ExitCode | tr ':' ' ' | cut -d' ' -f1))" ;;
      *CANCELLED*)
        case ${log:-none}:$before_state in
          none:*FAILED* | none:*TIMEOUT* | none:*OUT_OF_MEMORY* | none:*CANCELLED* | none:*NODE_FAIL*)
            now="dropped, since $before ended ${before_state%% (*}; mend that and submit again" ;;
        esac ;;
    esac
    echo "$name job $id: $now"
    before="$name (job $id)" before_state=$now
  done < <(last_submit)
}

# Prints the lines of jobs.txt that the last submit wrote: from the last fit on, or from the last label if no fit
# precedes it.
last_submit() {
  awk '$2 == "fit" || ($2 == "label" && last != "fit") { first = NR } { last = $2; line[NR] = $0 }
    END { for (i = first; i <= NR; i++) if (i > 0) print line[i] }' "$run/logs/jobs.txt"
}

show_run() {
  local log logs
  [ -f "$run/plan.json" ] || fail "RUN='$run' has no plan.json; make status without RUN lists the newest runs"
  if [ -f "$run/logs/jobs.txt" ]; then describe_jobs; else echo "no jobs were submitted for it"; fi
  readarray -d '' logs < <(find "$run/logs" -maxdepth 1 \( -name 'label-*.log' -o -name 'fit-*.log' -o -name 'report-*.log' \) \
    -printf '%T@ %p\0' 2>/dev/null | sort -z -rn | cut -z -d' ' -f2- | head -z -n 3)
  for log in ${logs[@]+"${logs[@]}"}; do
    echo "--- $log"
    tail -n 4 "$log"
  done
  echo "---"
  site_environment
  "$BATCHJOB_PYTHON" -m batchjob show "$run"
}

show_newest() {
  local found count
  readarray -d '' found < <(find runs -mindepth 2 -maxdepth 2 -name plan.json -printf '%T@ %h\0' 2>/dev/null | sort -z -rn | cut -z -d' ' -f2- | head -z -n 5)
  [ ${#found[@]} -gt 0 ] || { echo "no run in $PWD/runs; make submit DATA=… makes one there"; return; }
  for run in "${found[@]}"; do
    count=$(find "$run/done" -name '[0-9]*.json' 2>/dev/null | wc -l)
    echo "$run: $count partition$([ "$count" = 1 ] || echo s) published"
    [ ! -f "$run/logs/jobs.txt" ] || describe_jobs | sed 's/^/  /'
  done
  echo "more of one of them: make status RUN=$(printf %q "${found[0]}")"
}

cancel() {
  local queued own=() id
  [ -f "$run/logs/jobs.txt" ] || fail "no jobs were submitted for RUN='$run'; make submit DATA=… does"
  queued=$(squeue -h -o %F) || exit 75
  while read -r id _; do
    if grep -qx "$id" <<<"$queued"; then own+=("$id"); fi
  done <"$run/logs/jobs.txt"
  [ ${#own[@]} -gt 0 ] || { echo "no job of this run is in the queue"; return; }
  scancel "${own[@]}"
  echo "cancelled ${own[*]}; what is published stays, make submit goes on with it"
}

case $verb in
  status) if [ -n "$run" ]; then show_run; else show_newest; fi ;;
  cancel) cancel ;;
  *) fail "unknown verb '$verb'; known: status, cancel" ;;
esac
