# Everything runs in .venv, which the first target that needs it makes. Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
ENVIRONMENT := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow style quality report

help:  ## show these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(ENVIRONMENT)  ## draw outputs/demo.png with the embedded model, on the CPU
	$(BIN)/python generate.py --demo --device cpu --output outputs/demo.png

test: $(ENVIRONMENT)  ## run the tests
	$(BIN)/python -m pytest

test-slow: $(ENVIRONMENT)  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

style: $(ENVIRONMENT)  ## format the code, and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(ENVIRONMENT)  ## check the code, and change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

report: $(ENVIRONMENT)  ## measure what the embedded weights are worth
	$(BIN)/python -m toy_faces.report

$(ENVIRONMENT): requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) has to be Python 3.11 or newer. Name another one: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt -c constraints.txt pytest hypothesis ruff
	touch $@
