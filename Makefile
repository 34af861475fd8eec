# What can be done here. Every target sets up .venv first if it has to; `make` alone lists the targets.
PYTHON ?= python3
# Installed before everything else, so that machines without a GPU can name a CPU build here.
TORCH ?= torch==2.13.0
VENV ?= .venv
# What follows the command in `make train`.
ARGS ?=
# Processes of `make test`, of one thread each (more threads than cores at least doubled its time).
# With 0 the tests run in pytest itself.
WORKERS ?= 2
# What follows the command in `make test*`; a `-m` here replaces the target's own.
PYTEST_ARGS ?=
# What bench-peers builds under .bench/; all of them by default.
PEERS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install -q -c constraints.txt
SLOW := slow and not data
ifneq ($(METALEARN_DATA_OMNIGLOT)$(METALEARN_DATA_CIFAR100),)
SLOW := (slow or data)
endif

.DEFAULT_GOAL := help
.PHONY: help setup train smoke test test-slow test-slurm lint typecheck bench bench-quick bench-peers

help: ## List the targets and the variables
	@echo "make TARGET [VARIABLE=value ...]"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{printf "  %-11s %s\n", $$1, $$2}'
	@echo "variables: PYTHON=$(PYTHON) TORCH=$(TORCH) VENV=$(VENV) WORKERS=$(WORKERS) ARGS= PYTEST_ARGS="

setup: $(STAMP) ## Create .venv and install everything, if pyproject.toml or constraints.txt changed
	@:

# torchmeta comes without what it asks for, because that would replace torch (see pyproject.toml).
# The stamp is written last: an installation that failed or was interrupted is done again by the next call.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a minute or more)"
	@$(BIN)/python -c "import pip" 2>/dev/null || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) -e ".[test]"
	@$(PIP) --no-deps torchmeta h5py ordered-set
	@touch $@

train: $(STAMP) ## One run: make train ARGS="algorithm=maml seed=3"
	@$(BIN)/metalearn $(ARGS)

smoke: $(STAMP) ## Train a tiny MAML and print its table (about ten seconds)
	@$(BIN)/metalearn dataset=sinusoid algorithm=maml backbone=mlp_sine trainer.max_steps=200 \
		trainer.val_every=100 trainer.val_episodes=50 trainer.test_episodes=100 logger=none

test: $(STAMP) ## The unmarked tests: no data, no network, no SLURM, under three minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-slow: $(STAMP) ## The slow tests, and those on data if METALEARN_DATA_OMNIGLOT or _CIFAR100 is set
	@$(BIN)/python -m pytest -q -m "$(SLOW) and not slurm and not gpu" $(PYTEST_ARGS)

test-slurm: $(STAMP) ## The tests on SLURM: that of $$SLURM_CONF, else a throw-away one (installs it where it may)
	@if [ -n "$$SLURM_CONF" ]; then exec $(BIN)/python -m pytest -q -m slurm $(PYTEST_ARGS); fi; \
	up=$$(scripts/slurm/slurm-up --accounting --cpus 4) && eval "$$up" || exit 1; \
	$(BIN)/python -m pytest -q -m slurm $(PYTEST_ARGS); code=$$?; \
	scripts/slurm/slurm-down; exit $$code

bench: bench-peers ## Time meta-steps, ours and every peer's: about half an hour
	@$(BIN)/metalearn bench $(ARGS)

bench-quick: PEERS = learn2learn
bench-quick: bench-peers ## Time W1 and W4 beside learn2learn and torch.func's vmap: under three minutes
	@$(BIN)/metalearn bench --quick $(ARGS)

bench-peers: $(STAMP)
	@TORCH="$(TORCH)" $(BIN)/python scripts/bench/build.py $(PEERS)

lint: $(STAMP) ## Formatting and lint: ruff format --check, ruff check
	@$(BIN)/ruff format --check --quiet . || { echo "run $(BIN)/ruff format"; exit 1; }
	@$(BIN)/ruff check --quiet .

typecheck: $(STAMP) ## Types: mypy on metalearn/
	@$(BIN)/mypy
