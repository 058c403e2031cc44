# Everything runs in .venv, which the first target that needs it makes. Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
ENVIRONMENT := .venv/.installed
TOOLS := .venv/.tools
BENCH := outputs/bench

.DEFAULT_GOAL := help
.PHONY: help demo app test test-slow style quality report tables bench

help:  ## show these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(ENVIRONMENT)  ## draw outputs/demo.png with the toy model, on the CPU
	$(BIN)/python generate.py --demo --device cpu --output outputs/demo.png

app: $(TOOLS)  ## open the page in the browser: sliders, presets, sweeps
	$(BIN)/python app.py

# Two workers with one thread each; a file stays in one worker, where its fixtures are made once.
test: $(TOOLS)  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(TOOLS)  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

style: $(TOOLS)  ## format the code, and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(TOOLS)  ## check the code, and change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

report: $(ENVIRONMENT)  ## measure what the weights of the toy model are worth
	$(BIN)/python -m toy_faces.report

tables: $(ENVIRONMENT)  ## repeat the paper's tables on the toy world, into docs/results.md
	$(BIN)/python -m paper.tables --quick

bench: $(ENVIRONMENT)  ## measure what AU control costs, on the CPU
	$(BIN)/python -m benchmarks.bench_inference --device cpu --models toy --batch-sizes 1 --repeats 9 --output $(BENCH)/inference.md
	$(BIN)/python -m benchmarks.bench_inference --device cpu --models toy --batch-sizes 4 8 --repeats 3 \
		--rows one-token lora-baked lora third-branch textbook --output $(BENCH)/batches.md
	$(BIN)/python -m benchmarks.bench_loading --device cpu --repeats 3 --output $(BENCH)/loading.md

$(ENVIRONMENT): requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) has to be Python 3.11 or newer. Name another one: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt -c constraints.txt
	touch $@

# What only tests, style and the page in the browser need.
$(TOOLS): $(ENVIRONMENT)
	$(BIN)/python -m pip install -c constraints.txt pytest pytest-xdist hypothesis ruff tensorboard gradio playwright
	touch $@
