# Each target makes .venv by itself; nothing else has to be installed but Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test check format bench bench-kafka bench-postgres bench-export bench-trace bench-replay prove wheel docs clean

help:
	@echo "make demo    the shop on real orders, killed with kill -9 while it works"
	@echo "make test    all tests and proofs, and the wheel in an empty environment"
	@echo "make check   format, lint, types, import directions and the fast tests (some minutes)"
	@echo "make bench   speed, as ratios to raw loops in the same run -> bench/RESULTS*.md"
	@echo "make docs    the documentation as a static site -> build/site/index.html"
	@echo "make prove   the long proofs: many more kills, crash states and seeds"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "unlost needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $(READY)

demo: $(READY)
	@$(BIN)/unlost demo

format: $(READY)
	$(BIN)/ruff format src tests bench examples
	$(BIN)/ruff check --fix src tests bench examples

check: $(READY)
	$(BIN)/ruff format --check src tests bench examples
	$(BIN)/ruff check src tests bench examples
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 -m "not slow" tests/unit tests/conformance

test: $(READY)
	$(BIN)/ruff check src tests bench examples
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist loadfile --durations=15
	$(MAKE) wheel

# The wheel must work where no checkout is: an empty environment in an empty folder.
wheel: $(READY)
	$(BIN)/python tests/wheel.py

bench: $(READY)
	$(BIN)/python bench/run.py
	$(BIN)/python bench/kafka_run.py
	$(BIN)/python bench/postgres_run.py

bench-kafka: $(READY)
	$(BIN)/python bench/kafka_run.py

bench-postgres: $(READY)
	$(BIN)/python bench/postgres_run.py

bench-export: $(READY)
	$(BIN)/python bench/export_run.py

bench-trace: $(READY)
	$(BIN)/python bench/trace_run.py

bench-replay: $(READY)
	$(BIN)/python bench/replay_run.py

prove: $(READY)
	env KILLS=3000 SECONDS=1800 STATES=20000 $(BIN)/pytest tests/crash
	env SECONDS=600 $(BIN)/pytest tests/kafka/faults
	env SECONDS=600 $(BIN)/pytest tests/postgres/faults

docs: $(READY)
	@$(BIN)/python docs/build.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist build unlost-demo
