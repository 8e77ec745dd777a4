# `make demo` and `make test` set up what they need in .venv; no flag is needed.
PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin
READY := .venv/.ready
PROMPT := a small orange cross in the bottom right corner on black

.PHONY: demo test lint package train clean

demo: $(READY)
	$(BIN)/python -m pixart.generate "$(PROMPT)" --output demo.png
	@echo "The picture is at $(CURDIR)/demo.png"

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A wheel of what is committed must hold the packages, the embedded model, and nothing else.
package: $(READY)
	rm -rf dist build
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .
	$(BIN)/python -m pytest tests/test_packaging.py --wheel dist/*.whl

train: $(READY)
	$(BIN)/python -m pixart.train shapes

$(READY): setup.py pyproject.toml .ci/environment
	PYTHON=$(PYTHON) .ci/environment
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
