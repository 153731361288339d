PYTHON ?= python3.11
# mlflow run --env-manager local runs the `python` that it finds first.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: run demo test coverage test-slow check clean

run: .venv/installed
	mlflow run . --env-manager local -P scale=tiny

demo: .venv/installed
	mlflow run . --env-manager local -e ladder -P ladder=miniature
	mlflow run . --env-manager local -e compare -P ladder=miniature

test: .venv/installed
	OMP_NUM_THREADS=1 python -m pytest -m "not slow" -n 2 --dist worksteal

coverage: .venv/installed
	rm -f .coverage .coverage.*
	OMP_NUM_THREADS=1 python -m coverage run -m pytest -m "not slow" -n 2 --dist worksteal
	python -m coverage combine --quiet
	python -m coverage report

test-slow: .venv/installed
	python -m pytest -m slow

check: .venv/installed
	ruff check .
	mypy
	lint-imports

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	python -m pip install --upgrade "pip>=25"
	python -m pip install --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
