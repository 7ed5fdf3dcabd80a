# `make demo` and `make test` are the only commands a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint types parity clean

demo: $(INSTALLED)
	rm -rf demo-out
	$(BIN)/mlx-afm demo --out demo-out

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not parity and not slow and not manual"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

parity: .venv/.parity
	$(BIN)/python -m pytest -m "parity or slow"

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

.venv/.parity: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,parity,lm-eval,clients,browser]"
	touch $@

clean:
	rm -rf .venv build demo-out *.egg-info
