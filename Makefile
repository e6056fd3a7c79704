# make demo: train three small networks on handwritten digits and test their ensemble, in a few minutes on two cores.
# make test: ruff and pytest. make test-slow: what takes minutes. make test-faults: 200 kills and 100 other signals.
# All make .venv first; PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV := .venv/bin/python
PIP := $(VENV) -m pip install --disable-pip-version-check -c constraints.txt

# Mirrored digits are other signs, so no flips; half the image size, half the crop's padding; few epochs, higher rates.
DEMO := --data digits --image-size 16 --flip 0 --crop-padding 2 --recipe baseline --base-lr 0.02 --overwrite
DIRS := --checkpoint-dir checkpoints/demo --plot-dir plots/demo

.PHONY: demo test test-slow test-faults format clean
demo: .venv/core
	@echo "Three small networks on 1,797 handwritten digits, enlarged to 16×16 pixels"
	$(VENV) dense.py $(DEMO) $(DIRS) --depth 37 --growth-rate 12 --epochs 12
	$(VENV) mobilenetv2.py $(DEMO) $(DIRS) --width 0.5 --epochs 25
	$(VENV) resnext.py $(DEMO) $(DIRS) --base-width 8 --base-lr 0.1 --warmup 0.15 --schedule-step batch --epochs 15
	$(VENV) main_ens.py $(DIRS)
	@echo "the members' curves: plots/demo/densenet.png plots/demo/mobilenetv2.png plots/demo/resnext.png"

test: .venv/dev
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m pytest

test-slow: .venv/dev
	$(VENV) -m pytest -m slow

test-faults: .venv/dev
	FAULTS=200 $(VENV) -m pytest -v -m slow tests/test_faults.py

format: .venv/dev
	$(VENV) -m ruff check --fix .
	$(VENV) -m ruff format .

clean:
	rm -rf .venv checkpoints/demo plots/demo

$(VENV):
	$(PYTHON) -m venv .venv

.venv/core: requirements.txt constraints.txt | $(VENV)
	$(PIP) -r requirements.txt scikit-learn
	touch $@

.venv/dev: requirements-dev.txt requirements.txt constraints.txt | $(VENV)
	$(PIP) -r requirements-dev.txt
	touch $@
