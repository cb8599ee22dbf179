# The one file to edit for a cluster. Every script in this folder reads it; variables that the environment sets already
# keep their values. An empty size or time means what the partition's nodes allow, as Slurm says at `make submit`.

: "${BATCHJOB_PARTITION:=}"          # empty: the cluster's default
: "${BATCHJOB_ACCOUNT:=}"            # empty: the user's default
: "${BATCHJOB_TIME:=}"               # of one attempt, after which the job requeues itself and goes on; empty: at most 24:00:00
: "${BATCHJOB_CPUS_PER_GPU:=}"       # for each task; empty: at most 8, enough to decode 3,000 photos a second
: "${BATCHJOB_MEM_PER_GPU:=}"        # for each task; empty: at most 32G
: "${BATCHJOB_GPU_TYPE:=}"           # e.g. h100, if the cluster has several types
: "${BATCHJOB_GPU_FLAG:=gres}"       # gres: --gres=gpu:N for each node; none: nothing, where jobs get whole nodes anyway
: "${BATCHJOB_WARN_S:=120}"          # a job stops by itself so many seconds before its time limit
: "${BATCHJOB_REPORT_PARTITION:=$BATCHJOB_PARTITION}" # of the job that makes tables and pictures; it needs no GPU
: "${BATCHJOB_REPORT_CPUS:=}"        # empty: at most 8
: "${BATCHJOB_REPORT_MEM:=}"         # empty: at most 32G
: "${BATCHJOB_REPORT_TIME:=$BATCHJOB_TIME}"
: "${BATCHJOB_PYTHON:=}"             # empty: the active environment, else .venv of this project
: "${BATCHJOB_SCRATCH:=${TMPDIR:-/tmp}/batchjob-$(id -u)}" # a node's local disk, for compiled kernels
BATCHJOB_EXTRA=(${BATCHJOB_EXTRA[@]+"${BATCHJOB_EXTRA[@]}"}) # more sbatch flags, e.g. (--qos=long --constraint=ib)

# Sets what a job needs before Python starts, on the login node and on the compute nodes.
site_environment() {
  # module load python/3.12 cuda/13
  if [ -z "$BATCHJOB_PYTHON" ]; then
    local active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    if [ -n "$active" ] && [ -x "$active/bin/python" ]; then BATCHJOB_PYTHON=$active/bin/python
    elif [ -x "$BATCHJOB_HOME/.venv/bin/python" ]; then BATCHJOB_PYTHON=$BATCHJOB_HOME/.venv/bin/python
    else echo "no environment: activate one, or run 'make env' in $BATCHJOB_HOME" >&2; return 2; fi
  fi
  export BATCHJOB_PYTHON PYTHONPATH=$BATCHJOB_HOME${PYTHONPATH:+:$PYTHONPATH}
  export PYTHONUNBUFFERED=1
  # Compute nodes have no internet, and a job must not wait for a hub that it cannot reach.
  export HF_HUB_OFFLINE=1
  export TRITON_CACHE_DIR=$BATCHJOB_SCRATCH/triton TORCHINDUCTOR_CACHE_DIR=$BATCHJOB_SCRATCH/inductor
}
