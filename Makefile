# The commands of this project; `make help` lists them. Every option of batchjob is a variable: K=7 MODEL=… LAYERS=all.
# Variables are read from make's command line only, not from the environment, since K, SEED and DATA are common names.
# Their values reach the program unchanged: nothing in them is expanded or executed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON = python3
# An active environment is used as it is; else .venv is made.
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
ENV := $(or $(ACTIVE),.venv)
PY := $(ENV)/bin/python
# One stamp for each environment and checkout, so that a second `make` takes no time and another clone installs itself.
STAMP := $(ENV)/.batchjob$(subst /,_,$(CURDIR))
GPU = auto
IN_TWO = -n 2 --dist loadgroup --no-loadscope-reorder

# `make run` without DATA runs the embedded sample, at a size that is large enough for its figures.
SAMPLE := batchjob/sample
SAMPLE_RUN := runs/sample

RESULT_OPTIONS := MODEL WEIGHTS IMAGE_SIZE RESIZE LAYERS HEADS STAGE SCOPE QUERIES ALGORITHM CLUSTER_ON DISTANCE K N_INIT REPEATS SEED \
  PRECISION ANNOTATIONS SPLIT SCORES KEEP_MAPS FEATURES FIT_ROWS LIMIT ROWS_PER_PARTITION
RUNTIME_OPTIONS := DEVICE ENGINE GPUS BATCH_SIZE WORKERS MAX_FAILURES
# the shape of the job for `make submit`, where GPUS is the number for each node
SHAPE := NODES GPUS TASKS ARRAY
# these are not handed on in the environment either, since make would expand them
unexport DATA RUN RETRY_FAILED NODES TASKS ARRAY SMOKE NAMES GPU $(RESULT_OPTIONS) $(RUNTIME_OPTIONS)

lower = $(subst _,-,$(shell echo $(1) | tr A-Z a-z))
given = $(if $(filter command,$(firstword $(origin $(1)))),$(value $(1)))
define newline


endef
# quotes for bash, which runs the recipes; a line break becomes $'\
', since make removes @ and - at the start of a line
quoted = '$(subst $(newline),'$$'\n'',$(subst ','\'',$(1)))'
flags = $(foreach name,$(1),$(if $(call given,$(name)),--$(call lower,$(name)) $(call quoted,$(call given,$(name)))))
RETRY = $(if $(filter-out 0,$(call given,RETRY_FAILED)),--retry-failed)
RESULT_FLAGS = $(call flags,$(RESULT_OPTIONS))
RUNTIME_FLAGS = $(call flags,$(RUNTIME_OPTIONS))
DATA_ARG = $(call quoted,$(call given,DATA))
RUN_ARG = $(if $(call given,RUN),$(call quoted,$(call given,RUN)))
RUN_OR_SAMPLE = $(or $(RUN_ARG),$(SAMPLE_RUN))

.PHONY: help env dev run submit status cancel stats figures report show test test-slow test-gpu gpu-proof bench check docs clean

help:  ## show this list
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

run: env  ## run the whole job, on the sample or on DATA=/folder, tar, COCO root… (RETRY_FAILED=1: retry failed images)
	@if [ -n $(DATA_ARG) ]; then
	  $(PY) -m batchjob run $(DATA_ARG) $(RUN_ARG) $(RETRY) $(RESULT_FLAGS) $(RUNTIME_FLAGS)
	else
	  run=$(RUN_OR_SAMPLE)
	  $(PY) -m batchjob run $(SAMPLE) "$$run" --k instances --image-size 448 --keep-maps 8 \
	    --scores attention,pairs $(RETRY) $(RESULT_FLAGS) $(RUNTIME_FLAGS) >/dev/null
	  answer=$$($(PY) -m batchjob stats "$$run")
	  echo 'drawing the figures and the report' >&2
	  $(PY) -m batchjob figures "$$run" >/dev/null
	  $(PY) -m batchjob report "$$run" >/dev/null
	  echo
	  grep -v -e '^$$' -e '^tables: ' -e '^heads, ' <<< "$$answer"
	  echo
	  echo "open:    $$run/report.html"
	  echo "figures: $$run/figures/  (overview.png stands for all)"
	  echo "arrays:  $$run/labels.zarr  (README.md has the lines that load it)"
	  echo "more:    $(PY) -m batchjob stats $$run --verbose; make run DATA=/your/images"
	fi

submit: env  ## queue the job on a Slurm cluster: DATA=/coco NODES=2 GPUS=4 (ARRAY=8: as a job array)
	@$(foreach name,$(SHAPE),$(name)=$(call quoted,$(call given,$(name)))) slurm/submit.sh $(DATA_ARG) $(RUN_ARG) \
	  $(RETRY) $(RESULT_FLAGS) -- $(call flags,$(filter-out GPUS,$(RUNTIME_OPTIONS)))

status: env  ## show jobs, logs and progress of RUN=… on the cluster; without RUN, of the newest runs
	@slurm/jobs.sh status $(RUN_ARG)

cancel:  ## cancel the jobs of RUN=…; what is published stays
	@slurm/jobs.sh cancel $(RUN_ARG)

stats: env  ## compute the tables of RUN=…: scores, null models, intervals
	@$(PY) -m batchjob stats $(RUN_OR_SAMPLE) $(call flags,ANNOTATIONS)

figures: env  ## draw the pictures of RUN=…
	@$(PY) -m batchjob figures $(RUN_OR_SAMPLE)

report: env  ## write one HTML page of RUN=…
	@$(PY) -m batchjob report $(RUN_OR_SAMPLE)

show: env  ## show plan, progress, throughput and failures of RUN=…
	@$(PY) -m batchjob show $(RUN_OR_SAMPLE)

test: dev  ## run the tests, except those that need a GPU, Slurm or minutes
	@$(PY) -m pytest $(IN_TWO)

test-slow: dev  ## run the long tests: kills, real Slurm, 20,000 images
	@$(PY) -m pytest $(IN_TWO) -m 'slow and not gpu'

test-gpu: dev  ## run the tests for an NVIDIA GPU; fails if there is none
	@$(PY) -m pytest -m gpu

gpu-proof: dev  ## run every check that needs a GPU, in under 8 minutes: build/gpu-proof.md (exits 2 without a GPU)
	@$(PY) -m tests.benchmarks.gpu_proof

bench: dev  ## measure speed against named peers (SMOKE=1: only check that the benchmarks run; NAMES=…)
	@$(PY) -m tests.benchmarks $(if $(call given,SMOKE),--smoke) $(call given,NAMES)

check: dev  ## check lint, format and types
	@$(PY) -m ruff check batchjob tests docs && $(PY) -m ruff format --check batchjob tests docs/*.py && $(PY) -m mypy batchjob

docs: env  ## build the documentation as a site: build/site/index.html
	@$(PY) -m pip install -q --disable-pip-version-check -e '.[docs]'
	$(PY) -m mkdocs build -q
	echo 'open: build/site/index.html'

clean:  ## remove build products and caches (runs and .venv stay)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
