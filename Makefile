# Every target sets up what it needs, in .venv, and again only when what it is made of has
# changed. PYTHON names the interpreter that .venv is made with.

PYTHON ?= python3
BIN := .venv/bin
# Two makes in this folder take turns at setting up.
TURN := flock Makefile
# Twice quiet: errors only.
PIP := $(TURN) $(BIN)/pip --quiet --quiet --disable-pip-version-check

# Of the tests, side by side, as they wait for most of their time. The second alone may install
# programs, which cannot be done twice at once.
PARTS := test-part-functional test-part-kernel-fuzz test-part-rest
# Functional, yet beside the kernel's, so that the parts take much the same time.
ABUSE := tests/functional/test_abuse.py

.DEFAULT_GOAL := help
.PHONY: help demo test $(PARTS) test-kernel fuzz sanitize soak wheel lint bench bench-quick bench-report build proto venv clean

help:  ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile | expand -t 19

demo: .venv/built  ## a server and a job of its own, live: the quickest look
	@sh scripts/demo.sh

test:  ## every check and every test, of what would be shipped
	@$(MAKE) --no-print-directory --jobs=4 --output-sync lint $(PARTS)

test-part-functional: .venv/installed
	.venv/installed/bin/pytest tests/functional --ignore=$(ABUSE)

test-part-kernel-fuzz: .venv/installed
	.venv/installed/bin/pytest tests/kernel tests/fuzz $(ABUSE)

test-part-rest: .venv/installed
	.venv/installed/bin/pytest --ignore=tests/functional --ignore=tests/kernel --ignore=tests/fuzz

test-kernel: .venv/built .venv/tools  ## the limits at work, in a Linux with all cgroup controllers
	$(BIN)/pytest tests/kernel

fuzz: .venv/built .venv/tools  ## each fuzzer for long: FUZZ_SECONDS=600
	FUZZ_SECONDS=$(or $(FUZZ_SECONDS),600) $(BIN)/pytest tests/fuzz/test_grpc.py tests/fuzz/test_native.py

sanitize: .venv/built .venv/tools  ## all of C and Cython under ASan, UBSan, TSan and valgrind
	THOROUGH=1 $(BIN)/pytest tests/fuzz/test_sanitizers.py

soak: .venv/built .venv/tools  ## the farm under fire for long: KILLS=1000
	JOBWORKER_KILLS=$(or $(KILLS),1000) $(BIN)/pytest tests/functional/test_faults.py

wheel: .venv/built .venv/tools  ## dist/: the wheel for this Python, and the sources
	$(BIN)/python -m build --no-isolation .
	$(BIN)/python -m auditwheel show dist/*.whl

lint: .venv/built .venv/tools  ## the checks that run nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint jobworker
	gcc -fsyntax-only -Wall -Wextra -Werror jobinit.c

# One question a script; all are asked, and make fails if one of them did. QUICK=1: small numbers.
QUESTIONS := stream_throughput job_rate isolation latency scale growth hostile

bench: .venv/built .venv/tools  ## every benchmark beside its floor; takes its time
	@failed=; for each in $(QUESTIONS); do \
	    QUICK=$(QUICK) $(BIN)/python benchmarks/$$each.py || failed="$$failed $$each"; done; \
	QUICK=$(QUICK) $(BIN)/pytest benchmarks/test_micro.py --quiet $(if $(QUICK),--benchmark-max-time=0.1) \
	    --benchmark-columns=median,rounds --benchmark-sort=name \
	    --benchmark-json=benchmarks/results/$(if $(QUICK),quick,raw)/micro.json \
	    || failed="$$failed micro"; \
	test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

bench-quick:  ## the same with small numbers, in under 3 minutes
	@$(MAKE) --no-print-directory bench QUICK=1

bench-report: .venv/tools  ## benchmarks/results, from what `make bench` has stored
	QUICK=$(QUICK) $(BIN)/python benchmarks/report.py

build: .venv/built  ## the extension and jobinit, in place

proto: .venv/tools  ## jobworker/pb, from proto/job_worker.proto
	$(BIN)/python scripts/generate_pb.py jobworker/pb

venv: .venv/built .venv/tools  ## .venv with jobworker and every tool

clean:  ## remove all that was made
	rm -rf .venv build dist *.egg-info jobworker/_bin jobworker/*.so
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/made: scripts/venv.sh
	@$(TURN) sh scripts/venv.sh $(PYTHON)
	@touch $@

.venv/built: .venv/made pyproject.toml setup.py jobinit.c $(wildcard jobinit/*.h) jobworker/_fastio.pyx
	@echo "Building jobworker"
	@$(PIP) install --group build
	@$(PIP) install --no-build-isolation --editable .
	@touch $@

.venv/tools: .venv/made pyproject.toml
	@echo "Installing the tools that check and test"
	@$(PIP) install --group dev
	@touch $@

# Beside .venv, where the sources are used as they are: the package as users get it.
.venv/installed: .venv/built .venv/tools $(shell find jobworker proto -name '*.py*' -not -path '*/__pycache__/*')
	@echo "Installing the wheel, to test it and not the sources"
	@rm -rf build/wheel && $(TURN) $(BIN)/python -m build --no-isolation --wheel --outdir build/wheel . >/dev/null
	@test -x $@/bin/pip || $(BIN)/python -m venv $@
	@$(TURN) $@/bin/pip --quiet --quiet --disable-pip-version-check install --upgrade 'pip>=25.1'
	@$(TURN) $@/bin/pip --quiet --quiet --disable-pip-version-check install --group dev
	@$(TURN) $@/bin/pip --quiet --quiet --disable-pip-version-check install --force-reinstall --no-deps build/wheel/*.whl
	@$(TURN) $@/bin/pip --quiet --quiet --disable-pip-version-check install build/wheel/*.whl
	@touch $@
