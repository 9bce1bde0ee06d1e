# Everything runs from a virtual environment of its own; `make demo` and `make test` set it up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Lightning, Transformers, Accelerate and skorch, in an environment of their own: `make test` does without them.
INTEGRATIONS := .venv-integrations
INTEGRATIONS_STAMP := $(INTEGRATIONS)/.installed

.PHONY: demo panel test fuzz test-integrations lint clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/backmatch compare --data digits --model mlp --epochs 15 --lr-factors 0.5 1 2 --tune-for loss --optimizers sgd adamw backmatch-sgd backmatch --jobs 2 --out runs/demo

# The comparison behind the README, the small budget of benchmarks/PROTOCOL.md.
DATA ?= ../shared/data
panel: $(STAMP)
	$(BIN)/python -m benchmarks run --data $(DATA) --jobs 2
	$(BIN)/python -m benchmarks report --markdown

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# The random networks of `make test`, more of them and new ones every night; a failure is made small, and prints how to repeat it.
fuzz: $(STAMP)
	HYPOTHESIS_PROFILE=nightly OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz -n auto --timeout 3600

$(INTEGRATIONS_STAMP): pyproject.toml constraints.txt constraints-integrations.txt
	test -x $(INTEGRATIONS)/bin/python || $(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/pip install --quiet --constraint constraints.txt torch numpy
	$(INTEGRATIONS)/bin/pip install --quiet --constraint constraints.txt --constraint constraints-integrations.txt --editable . \
		lightning transformers accelerate skorch scikit-learn pytest pytest-timeout
	touch $(INTEGRATIONS_STAMP)

test-integrations: $(INTEGRATIONS_STAMP)
	OMP_NUM_THREADS=1 $(INTEGRATIONS)/bin/python -m pytest tests/integrations

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(INTEGRATIONS) runs .hypothesis
