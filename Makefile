# `make check` and `make test` set up everything that they need in .venv; nothing outside it is touched.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt

.PHONY: check test test-portable thorough mutations mutations-sample mutations-check docs schema lint format clean

check: $(VENV)/.installed
	$(BIN)/recover check analyses/ioi_smollm2.yaml --out runs/ioi_smollm2

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# What computes, once more with the oldest kernels of PyTorch and MKL: rounding may decide no test.
NUMERIC := activation admissible cgls certify clamp constraint controls decompose defended gradient_free metrics \
	minimum pinning probes search soft_suffix solvers subspace transfer two_stage
test-portable: $(VENV)/.installed-dev
	ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n auto --dist worksteal $(NUMERIC:%=tests/test_%.py)

thorough: $(VENV)/.installed-dev
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest property_tests

# Break each line that a law guards, and see the law fail; `-sample` breaks six of them, `-check` only looks for stale guards.
mutations: $(VENV)/.installed-dev
	$(BIN)/python property_tests/mutations.py

mutations-sample: $(VENV)/.installed-dev
	$(BIN)/python property_tests/mutations.py --sample 6

mutations-check: $(VENV)/.installed-dev
	$(BIN)/python property_tests/mutations.py --check

# Warnings are errors (not with --quiet, which would hide them), and so is what a page would load from elsewhere.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -f docs/mkdocs.yml

# verdict.schema.json is generated from the models of the verdict; a test says where it is behind them.
schema: $(VENV)/.installed
	$(BIN)/python -m recover.protocol.schema

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs site

# torch goes first and by its exact version: a plain `torch` can pull several GB of CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e ".[dev]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(INSTALL) -e ".[docs]"
	touch $@
