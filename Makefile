# From a fresh clone: `make train` trains the tiny model, `make test` runs the tests. Both make an environment of
# their own in .venv first; stamps inside it keep a second run from installing again.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
RUN ?= tiny
TRAIN_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal

CHROMIUM ?= chromium

.PHONY: train test checks paper pictures clean

train: .venv/.installed
	$(BIN)/counterflow train $(RUN) $(TRAIN_ARGS)

test: .venv/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

checks: .venv/.installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright

paper: .venv/.installed
	$(BIN)/python -m counterflow.config.paper > docs/PAPER.md.new
	mv docs/PAPER.md.new docs/PAPER.md

# The pictures of the README: a schedule, and the page of a finished run as Chromium shows it, in light and dark.
pictures: .venv/.installed
	for theme in light dark; do \
	  $(BIN)/counterflow schedule dualpipe --theme $$theme --svg docs/pictures/dualpipe-$$theme.svg > /dev/null; \
	  [ $$theme = dark ] && scheme=0 || scheme=1; \
	  $(CHROMIUM) --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1060,1110 \
	    --blink-settings=preferredColorScheme=$$scheme --screenshot=docs/pictures/page-$$theme.png \
	    "file://$(abspath runs/$(RUN)/report.html)"; \
	done

# Removes what was installed and cached; runs/ stays, it is your work.
clean:
	rm -rf .venv .cache build counterflow.egg-info .pytest_cache .ruff_cache .hypothesis

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "'$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not there); Counterflow needs Python 3.11 or newer." \
	       "Install one and name it: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' lacks the venv module; an environment is made with it." \
	       "Install it (on Debian and Ubuntu the package python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: pyproject.toml constraints.txt | .venv/.made
	$(PIP) -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) -e '.[dev]'
	@touch $@
