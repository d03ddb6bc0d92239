# Each recipe line is a command you could type yourself. .venv is made once and reused until pyproject.toml changes.
ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := .venv/Scripts
else
PYTHON ?= python3
BIN := .venv/bin
endif

.PHONY: demo test check bench clean

demo: .venv/demo.stamp
	$(BIN)/wn21k predict sample:cat --model efficientnet_lite0.embedded_in1k --format table

test: .venv/test.stamp
	$(BIN)/python -m pytest

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/typed_program.py
	$(BIN)/kubernetes-validate --quiet --strict training/launch/kubernetes.yaml

bench: .venv/test.stamp
	$(BIN)/python benchmarks/predict.py

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/%.stamp: pyproject.toml .venv/pyvenv.cfg
	$(BIN)/python -m pip install $$(test -t 2 || echo --quiet) --disable-pip-version-check --editable '.[$*]'
	@touch $@

.PRECIOUS: .venv/%.stamp

clean:
	rm -rf .venv build dist
