# Everything a person does with a clone. PYTHON may name another interpreter (3.10 to 3.13).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test check bench clean

demo: $(VENV)/.installed  ## install, and draw a page of pictures into demo/
	$(BIN)/python examples/demo.py --out demo

test: $(VENV)/.tests  ## the tests, in a few minutes on two cores
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

check: $(VENV)/.checks  ## lint, format, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(VENV)/.tests  ## against diffusers, in turns, on random weights
	$(BIN)/python benchmarks/against_diffusers.py --dtype bfloat16
	$(BIN)/python benchmarks/against_diffusers.py --dtype float32

# torch by itself first: the pinned build is the one the constraints name, whatever else asks for it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e .
	touch $@

$(VENV)/.tests: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e ".[openvino,test]"
	# Its wheel carries the families' real tokenizers, which the tests compare with; nothing of it is imported.
	$(PIP) install --no-deps diffsynth==1.1.9
	touch $@

$(VENV)/.checks: $(VENV)/.tests
	$(PIP) install -c constraints.txt -e ".[openvino,test,dev,recipes]"
	touch $@

clean:
	rm -rf $(VENV) demo build
