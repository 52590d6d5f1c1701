# make serve   the daemon on the embedded base with the three shipped adapters
# make test    the whole gate: format, lint, types, tests
# make test-deploy   builds and runs the image, scrapes a daemon with Prometheus, asks the CRDs' own schemas: as root,
#                    with buildah mmdebstrap prometheus librsvg2-bin npm (docs/kubernetes.md)
#
# Each makes .venv with pinned dependencies first; a second run finds it and starts at once.
# PYTHON names the interpreter to make it with (3.11 or newer): make test PYTHON=python3.13

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := $(VENV)/.native
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Another environment may be active in the shell that calls make: it must not leak into this one.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_USER

.PHONY: serve test test-deploy lint clean

serve: $(INSTALLED) $(NATIVE)
	$(BIN)/adapterd serve --adapters adapters

test: lint $(NATIVE)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-deploy: $(INSTALLED) $(NATIVE)
	$(BIN)/python -m pytest --deploy --capture=no tests/deploy

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# torch comes first and alone, so that a build that is already chosen for this machine is not replaced.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "adapterd needs Python 3.11 or newer; name one with PYTHON=")'
	@echo "Installing pinned packages into $(VENV), this once"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[dev]'
	touch $@

# The C++ operators make a CPU several times faster; without a compiler everything runs all the same. Only what was built is
# remembered: whoever installs a compiler has them at the next make.
$(NATIVE): $(INSTALLED) $(wildcard adapterd/model/native/*.*)
	if $(BIN)/python -m adapterd.model.native; then touch $@; fi

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
