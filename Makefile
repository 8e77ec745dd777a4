# `make demo` and `make test` set up what they need in .venv; no flag is needed.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROMPT := a small orange cross in the bottom right corner on black

# Tests run on all cores, a process on each and a thread in each: models this small wait for threads.
# What a file sets up once is set up once, so a file stays together.
# What runs Triton's kernels on CPU tensors, a second time where it ran without them already: on all
# cores, since the interpreter uses one.
INTERPRETED := tests/kernels/test_kernels_*.py tests/house/test_golden.py \
	tests/patch/test_patch.py::test_an_accelerated_model_computes_what_it_did_before \
	tests/patch/test_patch.py::test_in_16_bits_the_error_is_at_most_twice_that_of_diffusers
OLDEST := $(VENV)/triton-3.6.0

SECONDS ?= 60

.PHONY: demo test browser fuzz test-oldest-triton lint package hub-kernels train bench bench-compare weak-to-strong \
	weak-to-strong-seeds scaling-study clean

demo: $(READY)
	$(BIN)/python -m pixart.generate "$(PROMPT)" --output demo.png --overwrite
	@echo "The picture is at $(CURDIR)/demo.png"

test: $(READY) browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses auto $(INTERPRETED) $(PYTEST_ARGS)

# For the tests that look at pages; where it cannot be installed they are skipped.
browser:
	@.ci/browser

# Damaged files on every reader, from fresh seeds, for SECONDS; and Ctrl-C at 30 random moments.
fuzz: $(READY)
	$(BIN)/python tests/fuzz --seconds $(SECONDS)
	$(BIN)/python tests/fuzz/interrupts.py

# The kernels again with the oldest Triton that they must work with; its interpreter needs NumPy < 2.4.
test-oldest-triton: $(OLDEST)
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest tests/bench/test_resources.py tests/gluon
	PYTHONPATH=$(OLDEST) TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/test_kernels_*.py

$(OLDEST): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==3.6.0 "numpy<2.4"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A wheel of what is committed must hold the packages, the embedded model, and nothing else.
package: $(READY)
	rm -rf dist build
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .
	$(BIN)/python -m twine check --strict dist/*.whl
	$(BIN)/python -m pytest tests/house/test_packaging.py tests/house/test_kernels_package.py --wheel dist/*.whl

# The operators as a repository that Hugging Face's `kernels` loads, in dist/hub-kernels.
hub-kernels: $(READY)
	$(BIN)/python kernels/hub_repository.py --output dist/hub-kernels

train: $(READY)
	$(BIN)/python -m pixart.train shapes

# BENCH_ARGS="-m smoke": what CI runs, without compilers and at the smallest sizes.
bench: $(READY)
	$(BIN)/python -m pytest bench --benchmark-only $(BENCH_ARGS)

# The paper's claims about training from weak to strong, on the embedded model; under an hour.
weak-to-strong: $(READY)
	$(BIN)/python -m bench.studies.weak_to_strong

# Its rows that one run did not decide, with three seeds each; over an hour. Goes on where it was stopped.
weak-to-strong-seeds: $(READY)
	$(BIN)/python -m bench.studies.weak_to_strong.seeds

# Which denoiser and which data scale, on the embedded world, into the folder STUDY; 135 CPU-minutes. A
# second start goes on; what is committed is that of STUDY=bench/studies/scaling.
STUDY ?= runs/scaling
scaling-study: $(READY)
	$(BIN)/python -m pixart.scaling study --output "$(STUDY)" --minutes 180

# The smoke benches of this working tree and of the revision BASE, in turn; fails if one of ours is
# slower beyond the noise.
bench-compare: $(READY)
	$(BIN)/python -m bench.compare "$(BASE)" $(BENCH_ARGS)

$(READY): setup.py pyproject.toml .ci/environment
	PYTHON=$(PYTHON) VENV=$(VENV) .ci/environment
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
