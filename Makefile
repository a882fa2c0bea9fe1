# Everything happens in .venv; nothing is installed globally. Needed: make, a POSIX shell, Python 3.11 or newer.
#
#   make book                                     the static book
#   make test                                     every check
#   make book PYTHON=python3.12                   another Python (only asked when .venv is made)
#   make book TORCH_INDEX=https://download.pytorch.org/whl/cpu    a torch without CUDA, several GB smaller
#   make test ONLY=pages                          one step of `make test`
#   make notebooks FILES=notebooks/02_*.ipynb     only these notebooks (also for measure; for audit, lists of versions)

PYTHON ?= python3
TORCH_INDEX ?=
ONLY ?=
FILES ?=
URL ?=
PY := .venv/bin/python
# the tests that need the extra `book`, which .venv-lowest does not have
NEED_BOOK_TOOLS := pages test_book_extensions.py test_mutants.py test_nbval_figures.py test_notebooks.py \
	test_proofs_page.py test_repository.py test_tools.py

export PYTHON TORCH_INDEX
# The environment is .venv alone, and what it holds is said here alone.
unexport PYTHONPATH PYTHONHOME VENV CONSTRAINTS EXTRAS PACKAGES UPGRADE

.DEFAULT_GOAL := help
.PHONY: help env book test notebooks lab measure mutants browser address constraints test-lowest test-newest audit clean

help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

env: ## set up .venv; the other targets do so themselves
	@sh tools/make_env.sh

book: env ## build the static book from the stored notebooks and print where it lies
	@$(PY) tools/build_book.py

test: env ## run every check; executes every notebook and compares its outputs
	@$(PY) tools/checks.py $(ONLY)

notebooks: env ## execute the notebooks and rewrite them in canonical form
	@$(PY) tools/run_notebooks.py $(FILES)

lab: env ## open the notebooks in JupyterLab
	@JUPYTER_PREFER_ENV_PATH=1 $(PY) -m jupyterlab --notebook-dir=notebooks

measure: env ## measure run time and memory of the notebooks, and write them at their heads
	@$(PY) tools/measure.py $(FILES)

mutants: env ## plant faults in the mathematical core and see whether tests notice; goes on where it was stopped
	@$(PY) tools/mutants.py

browser: ## install the browser that the accessibility checks need (Debian, Ubuntu)
	@sh tools/install_browser.sh

address: env ## make the repository's address known: make address URL=https://github.com/owner/name
	@$(PY) tools/set_address.py $(URL)

constraints: env ## upgrade everything within pyproject.toml's ranges and write constraints.txt
	@$(PY) -m pip install --upgrade --upgrade-strategy eager -e ".[book,test]"
	@$(PY) tools/freeze.py

test-lowest: ## run the package's tests with the oldest versions that pyproject.toml allows
	@VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt EXTRAS=test sh tools/make_env.sh
	@.venv-lowest/bin/python -m pytest tests $(addprefix --ignore=tests/,$(NEED_BOOK_TOOLS))

test-newest: ## run tests and notebooks with the newest versions that pyproject.toml allows; outputs may differ
	@VENV=.venv-newest CONSTRAINTS=/dev/null UPGRADE=yes sh tools/make_env.sh
	@.venv-newest/bin/python -m pytest tests --ignore=tests/pages
	@.venv-newest/bin/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=300 notebooks

audit: ## look the versions in constraints.txt up among the published advisories
	@VENV=.venv-audit PACKAGES=pip-audit==2.10.1 sh tools/make_env.sh
	@.venv-audit/bin/python tools/audit.py $(FILES)

clean: ## remove what was built; .venv stays
	@rm -rf _build build dist .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find src tests tools book notebooks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
