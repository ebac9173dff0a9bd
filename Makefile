PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all test-gpu lint

# Teacher, assistant and student on handwritten digits, then the chain beside the student alone.
DEMO := $(BIN)/python train.py --dataset digits --epochs 12 --run-dir runs/demo
demo: .venv/installed
	$(DEMO)/teacher --student plane10
	$(DEMO)/assistant --student plane4 --teacher plane10 --teacher-checkpoint runs/demo/teacher/plane10_seed1_best.pth.tar
	$(DEMO)/student --student plane2 --teacher plane4 --teacher-checkpoint runs/demo/assistant/plane4_seed1_best.pth.tar
	$(DEMO)/direct --student plane2 --teacher plane10 --teacher-checkpoint runs/demo/teacher/plane10_seed1_best.pth.tar
	$(DEMO)/alone --student plane2
	$(BIN)/python evaluate.py --checkpoint \
	    $(foreach run,teacher assistant student direct alone,runs/demo/$(run)/*_best.pth.tar)

# Under 4 minutes on 2 cores. test-all adds what takes minutes or a service: NNI, SLURM, a browser, CIFAR (where
# TAKD_CIFAR_DIR names it), and all fast tests once more in a copy without takd/cpu.
test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: test
	$(BIN)/python -m pytest -n 2 --dist loadfile -rs -m slow
	rm -rf .without-cpu && mkdir .without-cpu
	git ls-files -z ':!takd/cpu' | xargs -0 tar cf - | tar xf - -C .without-cpu
	cd .without-cpu && ../$(BIN)/python -m pytest -n 2 -m "not slow"

# On a machine with a GPU, some minutes; ends with a block of text for an issue.
test-gpu: .venv/installed-dev
	$(BIN)/python -m pytest tests/gpu --cuda 1

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	touch $@
