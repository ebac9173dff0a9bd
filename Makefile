# PYTHON is used as it is where it has what the goal needs; else .venv is made with it. What that is, by module:
PYTHON ?= python3
DEV := $(filter-out demo,$(MAKECMDGOALS))
NEEDS := torch torchvision numpy sklearn PIL tensorboard tqdm matplotlib $(if $(DEV),optuna pytest xdist ruff mypy)
MISSING := $(shell $(PYTHON) -c 'from importlib.util import find_spec as f; print(*(m for m in "$(NEEDS)".split() if not f(m)))')
ifeq ($(MISSING),)
RUN := $(if $(findstring /,$(PYTHON)),$(abspath $(PYTHON)),$(PYTHON))
else ifeq ($(filter torch,$(MISSING))$(filter file,$(origin PYTHON)),)
$(error $(PYTHON) has torch but not $(MISSING): $(PYTHON) -m pip install -r requirements$(if $(DEV),-dev).txt)
else
RUN := $(CURDIR)/.venv/bin/python
READY := .venv/installed$(if $(DEV),-dev)
endif

.PHONY: demo test test-all test-gpu lint

# Teacher, assistant and student on handwritten digits, then the chain beside the student alone.
DEMO := $(RUN) train.py --dataset digits --epochs 12 --run-dir runs/demo
demo: $(READY)
	$(DEMO)/teacher --student plane10
	$(DEMO)/assistant --student plane4 --teacher plane10 --teacher-checkpoint runs/demo/teacher/plane10_seed1_best.pth.tar
	$(DEMO)/student --student plane2 --teacher plane4 --teacher-checkpoint runs/demo/assistant/plane4_seed1_best.pth.tar
	$(DEMO)/direct --student plane2 --teacher plane10 --teacher-checkpoint runs/demo/teacher/plane10_seed1_best.pth.tar
	$(DEMO)/alone --student plane2
	$(RUN) evaluate.py $(foreach run,teacher assistant student direct alone,runs/demo/$(run)/*_best.pth.tar)

# Under 4 minutes on 2 cores. test-all adds what takes minutes or a service: NNI, SLURM, a browser, CIFAR (where
# TAKD_CIFAR_DIR names it), three at once since they wait for services, and all fast tests once more in a copy without
# takd/cpu.
test: $(READY)
	$(RUN) -m pytest -n 2 -m "not slow"

test-all: test
	$(RUN) -m pytest -n 3 --dist loadfile --no-loadscope-reorder -rs -m slow
	rm -rf .without-cpu && mkdir .without-cpu
	git ls-files -z ':!takd/cpu' | xargs -0 tar cf - | tar xf - -C .without-cpu
	cd .without-cpu && $(RUN) -m pytest -n 2 -m "not slow"

# On a machine with a GPU, some minutes; ends with a block of text for an issue.
test-gpu: $(READY)
	$(RUN) -m pytest tests/gpu --cuda 1

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check --quiet -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	.venv/bin/pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	touch $@
