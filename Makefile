# make demo: train three small networks on handwritten digits and test their ensemble, in a few minutes on two cores.
# make test: ruff and pytest. make test-slow: tests that take minutes. make test-faults: 200 kills and 100 other signals.
# All of them create .venv first; PYTHON=python3.12 selects the interpreter.

PYTHON ?= python3
VENV := .venv/bin/python
PIP := $(VENV) -m pip install --disable-pip-version-check -c constraints.txt

# No flips, since a mirrored digit is no digit; half the image size, so half the padding; few epochs, so a higher rate.
DEMO := --data digits --image-size 16 --flip 0 --crop-padding 2 --recipe baseline --base-lr 0.02 --overwrite
DIRS := --checkpoint-dir checkpoints/demo --plot-dir plots/demo

# make gpu: all measurements on a GPU, into $(GPU). If it is stopped, the next make gpu continues with what is missing.
# With a Python that has all packages: make gpu VENV=python3 -o .venv/dev. LAYERS, TRAIN, ENSEMBLE: additional flags.
GPU := benchmarks/results/gpu
NETWORKS := densenet mobilenetv2 resnext29
MEASURED := layers.json tests.txt $(NETWORKS:%=compile-%.json) headline/result.json $(NETWORKS:%=plain-%.json) \
	baseline/result.json

.PHONY: demo test test-slow test-faults gpu gpu-files format clean
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

gpu: .venv/dev
	-$(MAKE) --keep-going gpu-files
	$(VENV) benchmarks/gpu.py $(GPU)

gpu-files: $(MEASURED:%=$(GPU)/%)

$(GPU)/layers.json:
	$(VENV) benchmarks/layers.py $(LAYERS) --output $@

$(GPU)/tests.txt:  # one process per test: after a CUDA error, no other test works in the same process
	mkdir -p $(@D)
	for test in $$($(VENV) -m pytest --collect-only tests/test_cuda_graph.py -k on_a_gpu | grep ::); do \
		timeout 500 $(VENV) -m pytest -vv "$$test" | tail -n 30; done > $@.part
	test -s $@.part
	mv $@.part $@

$(GPU)/compile-%.json:
	$(VENV) benchmarks/train.py --networks $* --kinds ours_none ours_graph ours_inductor ours_both --rounds 1 \
		--seconds 1 $(TRAIN) --output $@

$(GPU)/plain-%.json:
	$(VENV) benchmarks/train.py --networks $* --rounds 1 --seconds 2 $(TRAIN) --output $@

$(GPU)/headline/result.json:
	$(VENV) benchmarks/ensemble.py --work runs/headline --output $(@D) $(ENSEMBLE)

$(GPU)/baseline/result.json:
	$(VENV) benchmarks/ensemble.py --work runs/baseline --output $(@D) --parallel $(ENSEMBLE) -- --recipe baseline

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
