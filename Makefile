# SPDX-License-Identifier: GPL-2.0-or-later
# The commands of daily work. `make help` lists them, CONTRIBUTING.md describes the loop.

# On plain Python: a compiled module that is older than its source would end the run.
PYTEST := PYTHONPATH=. ZSWAPD_PURE=1 .venv/bin/python -P -m pytest -q --shared-machine

.PHONY: help dev check quick test demo bench

help:  ## List the commands.
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' Makefile | expand -t 8

dev:  ## Make .venv: libraries, compiled modules, this checkout (editable).
	scripts/dev

check: .venv  ## Run the linters: ruff, mypy, import-linter and the rest.
	$(PYTEST) -p no:randomly tests/test_linters.py

quick: .venv  ## Run the tests that need no root and no build, on plain Python: 60 s at most.
	$(PYTEST) --numprocesses 2 --hypothesis-profile=short -m "not slow" tests/unit

test:  ## Run all tests (root).
	scripts/test

demo:  ## Swap 512 MiB for real and check every byte (root).
	scripts/demo

bench:  ## Measure the raw workload beside zram and nbdkit (root).
	scripts/bench raw

.venv:
	@echo "there is no .venv yet: run make dev" >&2; exit 1
