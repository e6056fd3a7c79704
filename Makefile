# make demo: train three small networks on handwritten digits and test their ensemble, in a few minutes on two cores.
# make test: ruff and pytest. Both make .venv first; PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV := .venv/bin/python
PIP := $(VENV) -m pip install --disable-pip-version-check -c constraints.txt

DEMO := --data digits --image-size 16 --checkpoint-dir checkpoints/demo --plot-dir plots/demo --overwrite

.PHONY: demo test format clean
demo: .venv/core
	@echo "Three small networks on 1,797 handwritten digits of 16×16 pixels."
	$(VENV) dense.py $(DEMO) --depth 37 --growth-rate 12
	$(VENV) mobilenetv2.py $(DEMO) --width 0.5
	$(VENV) resnext.py $(DEMO) --base-width 16
	$(VENV) main_ens.py --checkpoint-dir checkpoints/demo --plot-dir plots/demo
	@echo "Look at the pictures in plots/demo: densenet.png mobilenetv2.png resnext.png ensemble.png"

test: .venv/dev
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m pytest

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
