# make demo   a student learns from a teacher on real images, through our kernel; prints and stores the result
# make test   the tests
# Both make their own virtual environment first. Variables: PYTHON, VENV, TORCH, VIDFAST_CUDA, ARGS.

PYTHON ?= python3
VENV ?= .venv
# Pinned to what CI runs. On a machine with a GPU the index serves its CUDA build; TORCH=torch takes the newest.
TORCH ?= torch==2.13.0
# CUDA kernels are built where there is a GPU to run them; VIDFAST_CUDA=1 builds them anywhere nvcc is.
VIDFAST_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),auto,0)
export VIDFAST_CUDA
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := $(VENV)/bin
BENCH := $(BIN)/python -m pytest bench -q --bench-device=cpu --benchmark-quiet
NATIVE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test lint format bench clean

demo: $(VENV)/.train
	$(BIN)/vidfast distill $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python tests/run_folders.py $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

bench: $(VENV)/.dev
	mkdir -p bench/results
	env -u OMP_WAIT_POLICY $(BENCH) --bench-selection=full --benchmark-json=bench/results/cpu.json $(ARGS)
	OMP_WAIT_POLICY=passive $(BENCH) -k "loss_step or kernel or overhead or training_step" \
	  --benchmark-json=bench/results/cpu-passive.json $(ARGS)
	$(BIN)/vidfast report bench/results/*.json* --output report
	$(BIN)/vidfast report bench/results/*.json* --readme README.md
	$(BIN)/vidfast report bench/results/*.json* --readme docs/kernel-notes.md

clean:
	rm -rf $(VENV) build dist *.egg-info vidfast/_C*.so

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "vidfast needs Python 3.10 or later: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	touch $@

$(VENV)/.train: $(VENV)/.torch $(NATIVE)
	$(BIN)/pip install -q -e '.[train]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(NATIVE)
	$(BIN)/pip install -q -e '.[train,test,bench,dev]'
	$(BIN)/pip install -q --no-deps timm torchdistill torchvision
	touch $@ $(VENV)/.train
