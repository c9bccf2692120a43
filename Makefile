# Everything sets itself up: a .venv with pinned packages, made anew where pyproject.toml or constraints.txt changed.
# All paths are relative, so the checkout may lie in a folder with a space in its name.
PYTHON ?= python3
RUN := .venv/bin/python
READY := .venv/.ready
OUT ?= logitstore-demo
# The kernels are tested with these as well as with the pinned Triton. The interpreter of 3.6 needs a numpy of its time.
OTHER_TRITONS := 3.6.0 3.9.0
NUMPY_OF_3.6.0 := numpy==2.2.6

.PHONY: help setup demo test test-all bench real lint format clean

help:
	@echo "make demo    the whole pipeline on text that comes with Python; writes $(OUT)/report.html"
	@echo "make test    the test suite"
	@echo "make test-all  every case of the grids, every framework with a plug-in, the kernels with Triton $(OTHER_TRITONS)"
	@echo "make bench   speed and memory benchmarks (pytest-benchmark)"
	@echo "make real    the whole line on a real 135M teacher: fetches 93 MB, takes up to 20 minutes"
	@echo "make lint    ruff"
	@echo "make clean   remove .venv and what demo and real wrote"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "logitstore needs Python 3.11 or newer: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(RUN) -m logitstore_trainer demo --out '$(OUT)'

test: $(READY)
	$(RUN) -m pytest tests

test-all: $(READY) $(OTHER_TRITONS:%=.tritons/%)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,plugins]'
	$(RUN) -m pytest tests -m ''
	@set -e; for triton in $(OTHER_TRITONS); do \
		echo "Triton $$triton"; \
		PYTHONPATH=.tritons/$$triton $(RUN) -m pytest -q tests/kernels/test_triton_*.py tests/kernels/test_compile_gate.py; \
	done

.tritons/%: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$* $(NUMPY_OF_$*)
	@touch $@

bench: $(READY)
	$(RUN) -m pytest benchmarks --benchmark-only

real: $(READY)
	$(RUN) benchmarks/quality/real_line.py --out logitstore-real $(if $(DATA),--data '$(DATA)')

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf .venv .tritons logitstore-demo logitstore-real build *.egg-info
