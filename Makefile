# The commands of this project; `make help` lists them. Every option of batchjob is a variable: K=7 MODEL=… LAYERS=all.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON ?= python3
# An active environment is used as it is; else .venv is made.
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
ENV := $(or $(ACTIVE),.venv)
PY := $(ENV)/bin/python
# One stamp an environment and checkout: a second `make` takes no time here, another clone installs itself.
STAMP := $(ENV)/.batchjob$(subst /,_,$(CURDIR))
GPU ?= auto

DATA ?=
RUN ?=
# What `make run` without DATA runs: the embedded sample, at a size at which its figure is worth looking at.
SAMPLE := batchjob/sample
SAMPLE_RUN := runs/sample

RESULT_OPTIONS := MODEL WEIGHTS IMAGE_SIZE RESIZE LAYERS HEADS STAGE SCOPE QUERIES ALGORITHM DISTANCE K N_INIT SEED \
  PRECISION ANNOTATIONS SPLIT SCORES KEEP_MAPS FEATURES FIT_ROWS LIMIT ROWS_PER_PARTITION
RUNTIME_OPTIONS := DEVICE ENGINE GPUS BATCH_SIZE WORKERS MAX_FAILURES
lower = $(subst _,-,$(shell echo $(1) | tr A-Z a-z))
flags = $(foreach name,$(1),$(if $($(name)),--$(call lower,$(name)) '$($(name))'))
# unquoted, for a job script that splits them at blanks
unquoted = $(foreach name,$(1),$(if $($(name)),--$(call lower,$(name)) $($(name))))
RESULT_FLAGS = $(call flags,$(RESULT_OPTIONS))
RUNTIME_FLAGS = $(call flags,$(RUNTIME_OPTIONS))

# of `make submit`: the shape of the job; GPUS counts those of each node there
NODES ?= 1
JOB_GPUS = $(or $(GPUS),1)
ARRAY ?=

.PHONY: help env dev run submit status cancel stats figures report show test test-slow test-gpu bench check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20
	echo "  Options are variables: make run DATA=/coco MODEL=vit_base_patch16_224.mae K=instances LAYERS=all"

env: $(STAMP)  ## install into .venv, or into the active environment (GPU=1: with cupy and cuml)

$(STAMP): pyproject.toml
	@$(PYTHON) -m batchjob.install '$(ENV)' --gpu '$(GPU)'
	touch '$@'

dev: $(STAMP)-dev

$(STAMP)-dev: pyproject.toml
	@$(PYTHON) -m batchjob.install '$(ENV)' --gpu '$(GPU)' --dev
	touch '$@' '$(STAMP)'

run: env  ## the whole job, on the sample or on DATA=/folder, tar, COCO root or list
	@if [ -n "$(DATA)" ]; then
	  $(PY) -m batchjob run '$(DATA)' $(if $(RUN),'$(RUN)') $(RESULT_FLAGS) $(RUNTIME_FLAGS)
	else
	  $(PY) -m batchjob run $(SAMPLE) '$(or $(RUN),$(SAMPLE_RUN))' --k instances --image-size 448 --keep-maps 8 \
	    --scores attention,pairs $(RESULT_FLAGS) $(RUNTIME_FLAGS)
	  $(PY) -m batchjob stats '$(or $(RUN),$(SAMPLE_RUN))'
	  $(PY) -m batchjob figures '$(or $(RUN),$(SAMPLE_RUN))'
	  $(PY) -m batchjob report '$(or $(RUN),$(SAMPLE_RUN))'
	  echo
	  echo 'open:   $(or $(RUN),$(SAMPLE_RUN))/report.html  (the figure alone: $(or $(RUN),$(SAMPLE_RUN))/figures/)'
	  echo 'arrays: $(or $(RUN),$(SAMPLE_RUN))/labels.zarr  (README.md has five lines that load it)'
	  echo 'next:   make run DATA=/your/images'
	fi

submit: env  ## queue the job on a Slurm cluster: DATA=/coco NODES=2 GPUS=4 (ARRAY=8: as a job array)
	@NODES='$(NODES)' GPUS='$(JOB_GPUS)' ARRAY='$(ARRAY)' FLAGS='$(call unquoted,$(filter-out GPUS,$(RUNTIME_OPTIONS)))' \
	  slurm/submit.sh '$(DATA)' $(if $(RUN),'$(RUN)') $(RESULT_FLAGS)

status: env  ## queue, logs and progress of RUN=… on the cluster
	@slurm/jobs.sh status '$(RUN)'

cancel:  ## take RUN=… out of the queue; what is published stays
	@slurm/jobs.sh cancel '$(RUN)'

stats: env  ## tables of RUN=…: scores, null models, intervals
	@$(PY) -m batchjob stats $(or $(RUN),$(SAMPLE_RUN)) $(if $(ANNOTATIONS),--annotations '$(ANNOTATIONS)')

figures: env  ## pictures of RUN=…
	@$(PY) -m batchjob figures $(or $(RUN),$(SAMPLE_RUN))

report: env  ## one HTML page of RUN=…
	@$(PY) -m batchjob report $(or $(RUN),$(SAMPLE_RUN))

show: env  ## plan, progress, throughput and failures of RUN=…
	@$(PY) -m batchjob show $(or $(RUN),$(SAMPLE_RUN))

test: dev  ## the tests (what needs a GPU, minutes or Slurm's packages is counted apart)
	@$(PY) -m pytest

test-slow: dev  ## the long ones: kills, real Slurm, the soak of the loader
	@$(PY) -m pytest -m 'slow and not gpu'

test-gpu: dev  ## the ones for an NVIDIA GPU; red where there is none
	@$(PY) -m pytest -m gpu

bench: dev  ## ratios against named peers, in one run (SMOKE=1: that they run; NAMES=…)
	@$(PY) -m tests.benchmarks $(if $(SMOKE),--smoke) $(NAMES)

check: dev  ## lint, format and types
	@$(PY) -m ruff check batchjob tests && $(PY) -m ruff format --check batchjob tests && $(PY) -m mypy batchjob

clean:  ## remove build products and caches (runs and .venv stay)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
