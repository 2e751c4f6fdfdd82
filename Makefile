# Everything begins here: `make help`. Each target installs what it needs into .venv first, once.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Seconds that workers get after SIGTERM to end a step and save, before the launcher kills them.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT ?= 300
# Words added to a command, such as ARGS="training.max_steps=10".
ARGS ?=
RECIPE ?=
LAUNCH ?=
# Of `make slurm`: machines, GPUs on each, and other options of sbatch, such as SBATCH="--partition=gpu --time=48:00:00".
NODES ?= 1
GPUS ?= 1
SBATCH ?=
# Of `make train`: other options of accelerate launch, such as LAUNCHER="--num_processes 4".
LAUNCHER ?=
# Launch files of a single process, whose launcher dies of a signal without passing it on.
ONE_PROCESS := cpu single_gpu
# given NAME, EXAMPLE: ends with an example where the variable is not set. Of the environment, where make puts what it is
# given on its command line: so it may hold quotes.
given = test -n "$${$(1):-}" || { echo "$(1) is missing: make $@ $(2)"; exit 2; }

.PHONY: help
help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  %-20s %s\n", $$1, $$2}'
	@echo
	@echo '  make train RECIPE=recipes/… [LAUNCH=cpu_2proc] [ARGS="section.key=value …"]'

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=…"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

.PHONY: install
install: $(INSTALLED)  ## Create .venv and install the kit with its development tools

.PHONY: demo
demo: $(INSTALLED)  ## Pretrain a small GPT-2 offline, adapt it to API documentation and its words, make it a classifier
	$(BIN)/kit train recipes/offline/lm_gpt2_pretrain.yaml
	$(BIN)/kit vocabulary mine recipes/offline/lm_gpt2_words.yaml --count 100 --overwrite
	$(BIN)/kit train recipes/offline/lm_gpt2_words.yaml
	$(BIN)/kit train recipes/offline/cls_gpt2_packages.yaml

.PHONY: test
test: $(INSTALLED)  ## Run the tests, offline
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not gpu" $(ARGS)

.PHONY: test-slow
test-slow: $(INSTALLED)  ## Run the tests that take longer
	$(BIN)/python -m pytest -q -n 2 -m slow $(ARGS)

.PHONY: test-gpu
test-gpu: $(INSTALLED)  ## Run the tests that need a GPU
	$(BIN)/python -m pytest -q -m gpu $(ARGS)

.PHONY: bench
bench: $(INSTALLED)  ## Measure speed and memory beside other trainers, on the CPU; installs them apart; 20 minutes
	$(BIN)/python -m benchmarks.speed $(ARGS)

.PHONY: bench-gpu
bench-gpu: $(INSTALLED)  ## The same on a GPU; ARGS=--only=… for a part of it
	$(BIN)/python -m benchmarks.speed --device cuda $(ARGS)

.PHONY: train
train: $(INSTALLED)  ## Train RECIPE, with LAUNCH=<accelerate_configs/…> in several processes
	@$(call given,RECIPE,RECIPE=recipes/offline/lm_gpt2_pretrain.yaml)
ifeq ($(LAUNCH),)
	$(BIN)/kit train $(RECIPE) $(ARGS)
else
	@$(has_launch_file)
	@$(has_recipe)
	@# The launcher turns every exit code but 0 into 1: how the run ended is read from its manifest.
	@echo "$(launch_line)"
	@# A signal has to reach the launcher, or its process: the shell would die of it and leave the run behind.
	@$(launch_line) & pid=$$!; \
	  trap '$(if $(filter $(ONE_PROCESS),$(LAUNCH)),pkill -TERM -P,kill -TERM) $$pid' TERM INT; code=0; wait $$pid || code=$$?; \
	  while kill -0 $$pid 2>/dev/null; do code=0; wait $$pid || code=$$?; done; \
	  test $$code = 0 || { $(BIN)/kit status $(RECIPE) $(ARGS) && exit 1; }
endif

launch_line = $(BIN)/accelerate launch --config_file accelerate_configs/$(LAUNCH).yaml $(LAUNCHER) -m kit train $(RECIPE) $(ARGS)
# Here, since a launcher would show a traceback of its own before the message; `kit status` names the nearest file.
has_recipe = test -f "$(RECIPE)" || exec $(BIN)/kit status "$(RECIPE)"
has_launch_file = test -f accelerate_configs/$(LAUNCH).yaml || { echo "LAUNCH=$(LAUNCH): no such launch file; there are:" \
  $(patsubst accelerate_configs/%.yaml,%,$(wildcard accelerate_configs/*.yaml)); exit 2; }

.PHONY: check
check: $(INSTALLED)  ## Find what is wrong with RECIPE without training it; ARGS=--probe runs two steps
	@$(call given,RECIPE,RECIPE=recipes/offline/lm_gpt2_pretrain.yaml)
	$(BIN)/kit check $(RECIPE) $(ARGS)

.PHONY: prepare
prepare: $(INSTALLED)  ## Tokenise RECIPE's data and measure its base model, without training
	@$(call given,RECIPE,RECIPE=recipes/offline/lm_gpt2_pretrain.yaml)
	$(BIN)/kit prepare $(RECIPE) $(ARGS)

.PHONY: vocabulary
vocabulary: $(INSTALLED)  ## Find words of RECIPE's text that would save tokens, and write them to a file to review
	@$(call given,RECIPE,RECIPE=recipes/text/lm_gpt2_full.yaml)
	$(BIN)/kit vocabulary mine $(RECIPE) $(ARGS)

.PHONY: evaluate
evaluate: $(INSTALLED)  ## Measure RUN's model on its recipe's sets
	@$(call given,RUN,RUN=runs/lm_gpt2_pretrain)
	$(BIN)/kit evaluate $(RUN) $(ARGS)

.PHONY: generate
generate: $(INSTALLED)  ## Continue PROMPT with RUN's model
	@$(call given,RUN,RUN=runs/lm_gpt2_pretrain PROMPT='Once upon')
	@$(call given,PROMPT,RUN=runs/lm_gpt2_pretrain PROMPT='Once upon')
	$(BIN)/kit generate $(RUN) --prompt "$$PROMPT" $(ARGS)

.PHONY: predict
predict: $(INSTALLED)  ## Classify the rows of FILE with RUN's model; ARGS="-o out.csv"
	@$(call given,RUN,RUN=runs/spam FILE=messages.csv)
	@$(call given,FILE,RUN=runs/spam FILE=messages.csv)
	$(BIN)/kit predict $(RUN) $(FILE) $(ARGS)

.PHONY: merge
merge: $(INSTALLED)  ## Write a plain model of RUN's adapter and its base model
	@$(call given,RUN,RUN=runs/lm_gpt2_lora)
	$(BIN)/kit merge $(RUN) $(ARGS)

.PHONY: slurm
slurm: LAUNCH := $(or $(LAUNCH),multi_node)
slurm: $(INSTALLED)  ## Train RECIPE as a SLURM job on NODES machines with GPUS on each
	@$(call given,RECIPE,RECIPE=recipes/text/lm_gpt2_full.yaml NODES=2 GPUS=8)
	@$(has_launch_file)
	@test -z "$(filter $(ONE_PROCESS),$(LAUNCH))" || { echo "LAUNCH=$(LAUNCH): its launcher would not pass on the" \
	  "signal that the slot ends; leave LAUNCH out, which starts as many processes as there are GPUs"; exit 2; }
	@[[ "$(NODES)" =~ ^[1-9][0-9]*$$ ]] || { echo "NODES=$(NODES): expected a number of machines, at least 1"; exit 2; }
	@[[ "$(GPUS)" =~ ^[0-9]+$$ ]] || { echo "GPUS=$(GPUS): expected a number of GPUs on each machine, 0 for none"; exit 2; }
	@$(has_recipe)
	@command -v sbatch >/dev/null || { echo "sbatch is not to be found: make slurm wants a machine of a SLURM cluster"; exit 2; }
	@mkdir -p runs/slurm
	@echo "$(slurm_line)"
	@$(slurm_line)

slurm_line = sbatch --job-name=$(basename $(notdir $(RECIPE))) --nodes=$(NODES) $(if $(filter-out 0,$(GPUS)),--gpus-per-node=$(GPUS)) \
  --output=runs/slurm/%x-%j.out $(SBATCH) accelerate_configs/slurm.sbatch $(LAUNCH) $(RECIPE) $(ARGS)

.PHONY: schema
schema: $(INSTALLED)  ## Write the JSON Schema of recipes for editors
	$(BIN)/kit schema --output recipes/recipe.schema.json

.PHONY: docs
docs: $(INSTALLED) schema  ## Write docs/recipes.md, the tables that the code gives to other pages, and the schema
	$(BIN)/kit schema --markdown --output docs/recipes.md
	KIT_WRITE_DOCS=1 $(BIN)/python -m pytest -q tests/test_troubleshooting.py tests/checkpoints/test_docs.py tests/test_scaling.py \
	  tests/test_performance_docs.py

.PHONY: lint
lint: $(INSTALLED)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: format
format: $(INSTALLED)  ## Mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: clean
clean:  ## Remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info

.PHONY: bench-classification
bench-classification: $(INSTALLED)  ## Compare classifiers with TF-IDF on several splits, on the demo's model and docstrings
	$(BIN)/python benchmarks/classification.py $(ARGS)

.PHONY: bench-domain
bench-domain: $(INSTALLED)  ## Show that domain text, not more training, is what adapts the model
	$(BIN)/python benchmarks/domain_control.py

.PHONY: bench-data
bench-data: $(INSTALLED)  ## Measure memory and speed of preparing a corpus
	$(BIN)/python benchmarks/preparation.py $(ARGS)

.PHONY: bench-faults
bench-faults: $(INSTALLED)  ## Kill runs in every part, start them again and compare; ARGS=--short for a few
	$(BIN)/python -m benchmarks.faults $(ARGS)

.PHONY: bench-freezing
bench-freezing: $(INSTALLED)  ## Compare what to train: all, a part, phases, LoRA; bits per byte, time, memory
	$(BIN)/python benchmarks/freezing.py $(ARGS)

.PHONY: bench-verify
bench-verify: $(INSTALLED)  ## Show what `kit verify` finds of the models in ARGS when one block of them is damaged
	$(BIN)/python benchmarks/verify.py $(ARGS)

.PHONY: bench-vocabulary
bench-vocabulary: $(INSTALLED)  ## Compare what new words' embeddings begin as, on the demo's model
	$(BIN)/python benchmarks/vocabulary.py $(ARGS)

.PHONY: bench-scaling
bench-scaling: $(INSTALLED)  ## Compare the formulas of docs/scaling.md with what is counted and measured
	$(BIN)/python benchmarks/scaling.py $(ARGS)
