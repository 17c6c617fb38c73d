# make test | bench | gpu | lint | format | wheel | manylinux | pure-wheel | sdist | clean | distclean
#
# Each target sets up what it needs, once, in $(VENV). Variables:
#   PYTHON=python3.12         the interpreter the environment is made from
#   VENV=none                 use PYTHON's own environment as it is (it has torch); nothing is installed, no network is used
#   TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
#                             what pip installs as torch: plain PyPI has the CUDA build, which is several GB
#   ARGS="-k gates -x"        more arguments for pytest or the benchmark runner
#
# make gpu: checks, timings and tests on this machine's GPU, in nine minutes at most; results in the folder OUT, else in benchmarks/results/.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=

ifeq ($(VENV),none)
PY := $(PYTHON)
else
PY := $(abspath $(VENV))/bin/python
endif
READY = $(if $(filter none,$(VENV)),,$(VENV)/.ready-$(1))
PIP := $(PY) -m pip --disable-pip-version-check --quiet --quiet
CLANG_FORMAT := $(PY) -c "import clang_format; clang_format.clang_format()"
CPP_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

# CUDA kernels for the GPUs of this machine, or for one kind where it has none. `make wheel` makes them for all kinds, for which
# nvcc takes 271 s of CPU instead of 95.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | awk -F. '$$1 >= 8 {print $$1 $$2}' | sort -u | paste -sd';' -)
build internals test bench: export DEPTHLSTM_CUDA_ARCHS ?= $(or $(GPUS),90)

export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: test bench gpu lint format wheel manylinux pure-wheel sdist build internals clean distclean
.DELETE_ON_ERROR:

# Without the tests marked slow: each is the long form of a check that is here too, and `.ci/run slow` runs them (ARGS="-m slow").
# By files to as many processes as there are cores, where pytest-xdist is there. Their OpenMP threads outnumber the cores then: one that
# spins while it waits keeps a core from the thread it waits for (58 s against 4.7 s for one test on busy cores).
test: build internals
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q tests -m "not slow" $$($(PY) -c "import xdist" 2>/dev/null && echo --numprocesses auto --maxprocesses 8 --dist loadfile) $(ARGS)

bench: $(call READY,bench) build
	$(PY) -m depthlstm_fast.bench $(ARGS)

# Without a GPU it ends at once. The library is built for the GPU at hand alone, in two minutes at most; what is not there is not measured.
gpu: $(call READY,bench)
	@started=$$(date +%s); $(PY) -m depthlstm_fast.bench.gpu --probe $(ARGS) || exit; \
	$(PY) -m depthlstm_fast.bench.gpu.build_library || true; \
	$(PY) -m depthlstm_fast.bench.gpu --started $$started $(ARGS)

lint: $(call READY,dev)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(if $(CPP_FILES),$(CLANG_FORMAT) --dry-run -Werror $(CPP_FILES),@echo "no C++ files to check")

format: $(call READY,dev)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(if $(CPP_FILES),$(CLANG_FORMAT) -i $(CPP_FILES))

# ninja decides what is out of date, so these run every time and take about a second when nothing is.
build: $(call READY,test)
	$(PY) setup.py -q build_ext --inplace

internals: build
	@if $(PY) -c "import pybind11" 2>/dev/null; then $(PY) setup.py -q build_internals; \
	else echo "pybind11 is not installed: the tests of C++ internals will be skipped"; fi

# setuptools packs whatever an earlier build left in build/lib*.
wheel: $(call READY,test)
	rm -rf build/lib* build/bdist*
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

# The wheel under the name that says which systems it is for, by the newest symbols of glibc and libstdc++ that it needs.
# torch's libraries come with torch.
manylinux: $(call READY,release) wheel
	PATH="$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH" $(PY) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist/manylinux dist/*-linux_*.whl
	@ls dist/manylinux/*.whl

# the reference and Triton, for any system
pure-wheel: $(call READY,test)
	rm -rf build/lib* build/bdist*
	DEPTHLSTM_NO_EXTENSION=1 $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist/pure .
	@ls dist/pure/*.whl

sdist: $(call READY,test)
	$(PY) setup.py -q sdist --dist-dir dist
	@ls dist/*.tar.gz

# torch comes first and is then held: the requirement torch>=2.11 alone would fetch the newest CUDA build.
$(VENV)/.ready-torch:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip --disable-pip-version-check install $(TORCH)
	$(PY) -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt "setuptools>=77" wheel "ninja>=1.11"
	touch $@

$(VENV)/.ready-%: $(VENV)/.ready-torch pyproject.toml setup.py
	$(PIP) install -c $(VENV)/constraints.txt --no-build-isolation -e ".[$*]"
	touch $@

clean:
	rm -rf build dist *.egg-info depthlstm_fast/_C.abi3.so depthlstm_fast/_C.build_failed.txt tests/_internals*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
