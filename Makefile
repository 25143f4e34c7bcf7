# The commands that never change: make demo, make test, make check, make bench.
# Each installs what it needs first (deploy/bootstrap.sh), so a fresh machine needs nothing but make, Python and root.
SHELL := /bin/bash
PY := .venv/bin/python
BENCH ?= cold

.PHONY: demo test check bench format proto clean

.venv/.installed-%: pyproject.toml csi-driver/pyproject.toml deploy/bootstrap.sh
	bash deploy/bootstrap.sh $*
	@touch $@

demo: .venv/.installed-demo
	$(PY) -m manta demo

test: .venv/.installed-dev
	$(MAKE) --no-print-directory check
	$(PY) -m pytest

check: .venv/.installed-dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

bench: .venv/.installed-bench
	$(PY) -m benchmarks $(BENCH) --json benchmarks/results/$(BENCH).json

# The stubs of the CSI driver, of csi-driver/manta_csi/proto/*.proto.
proto: .venv/.installed-dev
	$(PY) csi-driver/stubs.py

format: .venv/.installed-dev
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
