# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
CXX_SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu tests/device/*.cpp benchmarks/*.cpp)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DELETE_ON_ERROR:
.PHONY: help setup demo demo-distributed demo-swarm compare-small test test-all check format cuda-build gpu-check bench sanitize coverage clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/make \1#\2/p' $(MAKEFILE_LIST) | awk -F'#' '{printf "%-16s%s\n", $$1, $$2}'

setup: $(VENV)/.installed ## create .venv, install everything and build the extension

# torch comes first: the extension is built against the torch it runs with.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "nesterov_pp needs Python 3.10 or newer; name one: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot create a virtual environment; install its venv module (on Debian and Ubuntu: python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null || \
		{ echo "$(PYTHON) has no header files to build against; install them (on Debian and Ubuntu: python3-dev)" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
		{ echo "nesterov_pp needs a C++ compiler, and $${CXX:-c++} was not found; install one (on Debian and Ubuntu: g++)" >&2; exit 1; }
	@echo "Setting up $(VENV) with $(TORCH): some minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)" "setuptools>=77,<82" wheel ninja numpy
	@touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py pyproject.toml $(CXX_SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[train,analysis,swarm,test,dev]'
	@touch $@

demo: setup ## train on real text (about nine minutes), with a table and a plot in runs/demo; run it again to resume or to show them
	$(BIN)/python -m nesterov_pp compare --preset demo --out runs/demo --resume

# One thread a process: four processes share the cores.
demo-distributed: setup ## train the pipeline in four processes on this machine (about three minutes); survives kill -9 of any of them
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --nproc-per-node 4 --max-restarts 3 -m nesterov_pp train \
		--microbatches 6000 --context 32 --lr 2e-3 --checkpoint-every 250 --out runs/demo-distributed --resume

demo-swarm: setup ## two stages, five workers, two of them killed and one joining (about two minutes); ends with a picture
	$(BIN)/python -m benchmarks.swarm demo --out runs/demo-swarm

compare-small: setup ## compare 24 methods: 3 seeds, the better of 2 learning rates, 8 stages (up to an hour on 2 cores)
	$(BIN)/python -m nesterov_pp compare --preset small --out runs/small --resume

# Two processes; the tests of a file share what its fixtures make.
SIDE_BY_SIDE := -n 2 --dist loadfile

# What Triton's interpreter runs where there is no GPU.
INTERPRETED := $(addprefix tests/device/test_,backends.py capturable.py corrections.py)

# Threads that wait must not keep the cores from the processes beside them.
test test-all sanitize coverage: export OMP_WAIT_POLICY = passive

test: check ## run make check and the tests
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) $(INTERPRETED)

test-all: check ## run make check and all tests, including the slow ones and those of other frameworks
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[frameworks]'
	NPP_SANITIZE=1 $(BIN)/python -m pytest -m ""
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "" $(INTERPRETED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/optim tests/stash tests/kernels -k triton

check: setup ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: setup ## format the Python and C++ sources
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_SOURCES)

cuda-build: setup ## compile the CUDA sources for three architectures (needs nvcc), and count what the machine code does
	$(BIN)/python -m benchmarks.machine_code

bench: setup ## measure the optimizer step and torch's
	$(BIN)/python -m pytest benchmarks -m "" --benchmark-enable

GPU_CHECK ?=
gpu-check: ## build, test, measure and check the kernels within nine minutes (needs a GPU, but no network)
	$(PYTHON) -m benchmarks.gpu_check $(GPU_CHECK)

# In a copy of the tree, so that the extension in use stays as it is. torch itself is not instrumented: no leak check.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: setup ## run the C++ under the address and undefined-behaviour sanitizers
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r csrc nesterov_pp triton_kernels tests benchmarks setup.py pyproject.toml README.md build/sanitize
	rm -f build/sanitize/nesterov_pp/_C*
	sed 's/"-O3"/"-O1"/' setup.py > build/sanitize/setup.py
	cd build/sanitize && CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" ../../$(BIN)/python setup.py -q build_ext --inplace
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
		../../$(BIN)/python -m pytest $(SIDE_BY_SIDE) -p no:cacheprovider tests/kernels tests/optim tests/stash -k "not compile"
	NPP_SANITIZE=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/device

# The C++ is covered in a copy of the tree that is built for it, Python by the tests as they are.
COVERED := build/coverage
coverage: setup ## show which lines the tests run, in tables for Python and C++
	rm -rf $(COVERED) && mkdir -p $(COVERED)
	cp -r csrc nesterov_pp triton_kernels tests benchmarks docs examples setup.py pyproject.toml Makefile *.md LICENSE MANIFEST.in $(COVERED)
	rm -f $(COVERED)/nesterov_pp/_C*
	sed 's/"-O3"/"-O0"/; s/"-g0"/"-g"/' setup.py > $(COVERED)/setup.py
	cd $(COVERED) && CFLAGS="--coverage" LDFLAGS="--coverage" ../../$(BIN)/python setup.py -q build_ext --inplace
	cd $(COVERED) && ../../$(BIN)/python -m pytest -q -p no:cacheprovider tests/kernels tests/optim tests/stash
	COVERAGE_FILE=$(COVERED)/.coverage $(BIN)/python -m coverage run -m pytest -q
	COVERAGE_FILE=$(COVERED)/.coverage $(BIN)/python -m coverage combine -q
	COVERAGE_FILE=$(COVERED)/.coverage $(BIN)/python -m coverage report > $(COVERED)/python.txt
	cd $(COVERED) && ../../$(BIN)/gcovr -r . --filter csrc/ --merge-lines --txt cpp.txt
	@cat $(COVERED)/python.txt $(COVERED)/cpp.txt

clean: ## remove what was built and installed, but keep runs/
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	rm -f nesterov_pp/*.so nesterov_pp/_built_with_torch.txt
