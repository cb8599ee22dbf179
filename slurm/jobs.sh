#!/usr/bin/env bash
# slurm/jobs.sh status|cancel RUN: the jobs that submit.sh queued for a run.
set -euo pipefail
verb=${1:-} run=${2:-}
BATCHJOB_HOME=$(cd "$(dirname "$0")/.." && pwd)
export BATCHJOB_HOME
. "$BATCHJOB_HOME/slurm/site.sh"
[ -f "$run/logs/jobs.txt" ] || { echo "jobs: no jobs were submitted for RUN='$run'; make submit DATA=… does" >&2; exit 2; }
ids=$(cut -d' ' -f1 "$run/logs/jobs.txt" | paste -sd,)
case $verb in
  status)
    squeue --jobs="$ids" --format='%.14i %.16j %.10T %.10M %.12l %R' 2>/dev/null || echo "no job of this run is in the queue"
    for log in $(ls -t "$run"/logs/{label,fit,report}-*.log 2>/dev/null | head -n 3); do
      echo "--- $log"
      tail -n 4 "$log"
    done
    echo "---"
    site_environment
    "$BATCHJOB_PYTHON" -m batchjob show "$run" ;;
  cancel)
    scancel ${ids//,/ }
    echo "cancelled; what is published stays, make submit goes on with it" ;;
  *) echo "jobs: unknown verb '$verb'; known: status, cancel" >&2; exit 2 ;;
esac
