# Needs python3 (3.11 or newer) with pip. Everything else is installed into VENV on first use and again only when
# pyproject.toml changes. `make VENV= ...` uses PYTHON as it is and installs nothing.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
LIMIT ?= 520
OUTPUT ?= devices.json

# A GPU build of JAX where the driver lists a GPU.
CUDA_EXTRA := $(if $(findstring GPU ,$(shell nvidia-smi -L 2>/dev/null)),cuda13,)
comma := ,
BASE_EXTRAS := $(if $(CUDA_EXTRA),[$(CUDA_EXTRA)],)
TEST_EXTRAS := [test,dev$(if $(CUDA_EXTRA),$(comma)$(CUDA_EXTRA),)]

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
BIN :=
BASE :=
TEST :=
DOCS :=
else
PY := $(VENV)/bin/python
BIN := $(VENV)/bin/
BASE := $(VENV)/.installed
TEST := $(VENV)/.installed-test
DOCS := $(VENV)/.installed-docs
endif

# Shapes, dtypes and types are checked at run time under the tests, in modules that compute and check nothing themselves.
# Pytree containers (cache, packing) are left out: JAX rebuilds them with abstract leaves.
COMPUTING := models.decoder models.rotary ops.online_softmax ops.select
space := $(subst ,, )
CHECKS := --jaxtyping-packages=$(subst $(space),$(comma),$(addprefix minikv_jax.,$(strip $(COMPUTING)))),beartype.beartype
CUDA_SOURCES = $(wildcard cuda_ffi/csrc/*/*.cu cuda_ffi/csrc/*/*.cuh cuda_ffi/csrc/*/*.h)

.PHONY: bench-devices campaigns demo test test-slow test-gpu lint format docs clean

demo: $(BASE)  ## Generate from a long prompt with MiniKV's cache; prints what the cache saved.
	$(PY) -m minikv_jax.cli.main generate --model smollm2-135m-instruct --method minikv \
		--prompt-file examples/log.txt --max-new-tokens 64

test: $(TEST)  ## The suite on the CPU, without its slow tests; what needs a GPU is skipped, and counted in the summary.
	JAX_PLATFORMS=cpu $(PY) -m pytest $(CHECKS) -m "not slow and not campaign" -n $(WORKERS) $(PYTEST_ARGS)

test-slow: $(TEST)  ## The slow tests: real models, whole programs, compilation of the CUDA kernels.
	JAX_PLATFORMS=cpu $(PY) -m pytest $(CHECKS) -m slow -n $(WORKERS) $(PYTEST_ARGS)

campaigns: $(TEST)  ## Hundreds of damaged files, wrong arguments, kills and random configurations; every method on every mesh.
	JAX_PLATFORMS=cpu $(PY) -m pytest $(CHECKS) -m campaign -n $(WORKERS) $(PYTEST_ARGS)

test-gpu: $(TEST)  ## The tests that need a GPU; on a prepared machine: make test-gpu VENV= PYTHON=python3
	$(PY) -m pytest -m gpu $(PYTEST_ARGS)

bench-devices: $(TEST)  ## All GPUs together in LIMIT seconds, with the kernels' build and the tests of meshes; writes OUTPUT.
	$(PY) -m minikv_jax.cli.main bench devices --limit $(LIMIT) --output $(OUTPUT) \
		--before "$(PY) -m cuda_ffi.build" \
		--before "$(PY) -m pytest -q -m gpu tests/ops/test_all_reduce.py tests/test_generate_mesh.py" $(BENCH_ARGS)

lint: $(TEST)  ## Formatting, lint, spelling, types and the direction of imports.
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m codespell_lib .
	$(PY) -m pyright $(if $(VENV),--pythonpath $(PY))
	$(BIN)lint-imports
	$(if $(CUDA_SOURCES),$(BIN)clang-format --dry-run -Werror $(CUDA_SOURCES))

format: $(TEST)  ## Rewrite the sources as `make lint` wants them.
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
	$(if $(CUDA_SOURCES),$(BIN)clang-format -i $(CUDA_SOURCES))

docs: $(DOCS)  ## The documentation in site/; a broken link, or a docstring that does not parse, is an error.
	NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS=cpu $(PY) -m mkdocs build --strict

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .hypothesis .grimp_cache .import_linter_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install -q -e ".$(BASE_EXTRAS)"
	touch $@

# torch is pinned and goes first, by itself: whichever build of it pip is given (a CPU wheel will do) is then kept.
$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install -q torch==2.13.0
	$(PY) -m pip install -q -e ".$(TEST_EXTRAS)"
	touch $(VENV)/.installed $@

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install -q -e ".[docs]"
	touch $@
