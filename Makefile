PYTHON ?= python3.11
# mlflow run --env-manager local runs the `python` that it finds first.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
.DEFAULT_GOAL := help

.PHONY: help run demo test coverage test-slow check constraints licences audit clean

help: ## List the targets
	@grep -hE '^[a-z./-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([^:]+):.*## (.*)/make \1\t\2/' | expand -t 24

run: .venv/installed ## Train TINY on this machine, as an MLflow run
	mlflow run . --env-manager local -P scale=tiny

demo: .venv/installed ## Climb a ladder in miniature, and write its report
	mlflow run . --env-manager local -e ladder -P ladder=miniature
	mlflow run . --env-manager local -e compare -P ladder=miniature

test: .venv/installed ## Run the tests, without the slow ones
	OMP_NUM_THREADS=1 python -m pytest -m "not slow" -n 2 --dist worksteal

# Of the slow tests those of a whole sweep, of several processes, and of MLflow's own server.
SLOW_COVERED := tests/test_sweep.py tests/test_launch.py tests/test_mlflow_serving.py

coverage: .venv/installed ## Run the tests and some slow ones, and count the lines of svend/ that they reach
	rm -f .coverage .coverage.*
	OMP_NUM_THREADS=1 python -m coverage run -m pytest -m "not slow" -n 2 --dist worksteal
	OMP_NUM_THREADS=1 python -m coverage run -m pytest -m slow -n 2 --dist worksteal $(SLOW_COVERED)
	python -m coverage combine --quiet
	python -m coverage report

test-slow: .venv/installed ## Run the slow tests
	python -m pytest -m slow

check: .venv/installed ## Lint, types, the direction of imports
	ruff check .
	mypy
	lint-imports

.venv/installed: pyproject.toml constraints.txt svend/__init__.py ## Install into .venv, at the versions of constraints.txt
	$(PYTHON) -m venv .venv
	python -m pip install --upgrade --constraint constraints.txt pip
	python -m pip install --constraint constraints.txt --editable ".[dev]"
	touch $@

# A CUDA build of torch brings packages that a CPU build has not, and names itself 2.13.0+cu130:
# neither belongs into a list for both.
constraints: ## Renew constraints.txt: the newest versions that pyproject.toml allows
	rm -rf .venv-constraints
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --upgrade pip
	.venv-constraints/bin/python -m pip install --editable ".[dev]"
	.venv-constraints/bin/python -m pip freeze --all --exclude-editable > .venv-constraints/freeze
	sed -E -e 's/\+.*//' -e '/^(cuda-|nvidia-|triton==)/d' .venv-constraints/freeze > constraints.txt
	rm -rf .venv-constraints

licences: .venv/installed ## Write docs/licences.md from what is installed
	python .ci/licences.py docs/licences.md

audit: ## Ask PyPI for known vulnerabilities of what constraints.txt pins
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit==2.10.1
	.venv-audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

clean: ## Remove the environments and what the tools cache
	rm -rf .venv .venv-* build dist svend.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find svend tests -name __pycache__ -prune -exec rm -rf {} +
