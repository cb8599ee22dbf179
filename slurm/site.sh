# The one file that a cluster edits. Read by every script in this folder; values already in the environment win.
# Empty means: what the partition's nodes allow, asked of Slurm at `make submit`.

: "${BATCHJOB_PARTITION:=}"          # empty: the cluster's default
: "${BATCHJOB_ACCOUNT:=}"            # empty: the user's default
: "${BATCHJOB_TIME:=}"               # of one attempt, which saves, requeues and goes on at its end; empty: at most 24:00:00
: "${BATCHJOB_CPUS_PER_GPU:=}"       # of each task; empty: at most 8, enough to decode 3,000 photos a second
: "${BATCHJOB_MEM_PER_GPU:=}"        # of each task; empty: at most 32G
: "${BATCHJOB_GPU_TYPE:=}"           # e.g. h100, where a cluster has several
: "${BATCHJOB_GPU_FLAG:=gres}"       # gres: --gres=gpu:N a node; none: the cluster gives whole nodes without asking
: "${BATCHJOB_WARN_S:=120}"          # seconds before the time limit at which a job stops by itself
: "${BATCHJOB_REPORT_PARTITION:=$BATCHJOB_PARTITION}" # of the job that makes tables and pictures; it needs no GPU
: "${BATCHJOB_REPORT_CPUS:=}"        # empty: at most 8
: "${BATCHJOB_REPORT_MEM:=}"         # empty: at most 32G
: "${BATCHJOB_REPORT_TIME:=$BATCHJOB_TIME}"
: "${BATCHJOB_PYTHON:=}"             # empty: the active environment, else .venv of this project
: "${BATCHJOB_SCRATCH:=${TMPDIR:-/tmp}/batchjob-$(id -u)}" # local disk of a node: compiled kernels are kept there
BATCHJOB_EXTRA=(${BATCHJOB_EXTRA[@]+"${BATCHJOB_EXTRA[@]}"}) # more sbatch flags, e.g. (--qos=long --constraint=ib)

# What a job needs before Python starts, on the login node and on the compute nodes alike.
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
  # Compute nodes have no internet: nobody must wait for a hub that can't be reached.
  export HF_HUB_OFFLINE=1
  export TRITON_CACHE_DIR=$BATCHJOB_SCRATCH/triton TORCHINDUCTOR_CACHE_DIR=$BATCHJOB_SCRATCH/inductor
}
