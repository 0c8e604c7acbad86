# Every target makes what it needs in .venv; nothing has to be installed by hand.
PYTHON ?= python3
# Any torch from 2.10 on works; this one is what the committed figures were measured with.
TORCH ?= torch==2.13.0
export MAX_JOBS ?= 2
# Where there is a compiler for them, the CUDA kernels are built even without a GPU: so they are tested, too.
export FORCE_CUDA ?= $(if $(shell command -v nvcc),1)

# Kernels compile without a warning.
export NVCC_APPEND_FLAGS ?= -Werror all-warnings

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Of versions before 0.2.0; Python would import it instead of _C.abi3.so.
OLD := cen_ext/_C.cpython-*.so
SOURCES := $(wildcard examples/cpp/*.cpp csrc/*.* csrc/*/*.* csrc/*/*/*.* tests/host_cuda/*.*)

.PHONY: demo test peers systems build lint docs bench gpu clean

# Built for this processor alone, and without CUDA, in a third of the time; what make build has made is kept.
demo: $(VENV)/installed-models
	rm -f $(OLD)
	FORCE_CUDA=0 CEN_EXT_INSTRUCTION_SETS=native $(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python examples/demo.py

# Side by side, a file on one core at a time: those of a file share trained networks.
test: build
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Public networks that are converted, from libraries that nothing else needs.
peers: build $(VENV)/installed-peers
	$(BIN)/python -m pytest -n auto -m peers

# Every system of Table 3 on real images beside the checkout.
systems: build
	$(BIN)/python -m pytest -m systems

build: $(VENV)/installed
	rm -f $(OLD)
	$(BIN)/python setup.py --quiet build_ext --inplace

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

# The pages of docs as a site, in site/; a broken link ends it with an error.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs --quiet build --strict

# All figures: the operator's, the convolutions', a training step's; QUICK=1 for a minute's look at the operator.
bench: build
ifdef QUICK
	$(BIN)/python -m bench.operator --quick
else
	$(BIN)/python -m bench.operator
	$(BIN)/python -m bench.convolution
	for network in refinenet pspnet unet; do $(BIN)/python -m bench.training --network $$network || exit; done
endif

# All that needs a GPU: build, marked tests, compute-sanitizer, benchmark; results in bench/results.
gpu: build
	$(BIN)/python -m bench.gpu

clean:
	rm -rf build dist site *.egg-info cen_ext/*.so $(VENV)
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/installed-models: pyproject.toml cen_ext/version.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" ninja numpy "$(TORCH)"
	CEN_EXT_NO_BUILD=1 $(PIP) --no-build-isolation --editable ".[models]"
	touch $@

$(VENV)/installed: $(VENV)/installed-models
	CEN_EXT_NO_BUILD=1 $(PIP) --no-build-isolation --editable ".[models,test]" "$(TORCH)"
	touch $@

$(VENV)/installed-lint: $(VENV)/installed
	CEN_EXT_NO_BUILD=1 $(PIP) --no-build-isolation --editable ".[lint]"
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	CEN_EXT_NO_BUILD=1 $(PIP) --no-build-isolation --editable ".[docs]"
	touch $@

$(VENV)/installed-peers: $(VENV)/installed
	CEN_EXT_NO_BUILD=1 $(PIP) --no-build-isolation --editable ".[peers]" "$(TORCH)"
	touch $@
