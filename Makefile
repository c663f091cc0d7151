# Set-up happens by itself: every target that needs the environment makes it first.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was upon the face of the deep.

.PHONY: help setup run test lint check docs bless bench quick gpu clean

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(BIN)/moecc: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

setup: $(BIN)/moecc ## Make .venv with everything (TORCH=torch==... picks the build)

run: $(BIN)/moecc ## Generate text with the shipped model, beside transformers eager
	$(BIN)/moecc run benchmarks/reference --dtype float32 --prompt "$(PROMPT)"

test: $(BIN)/moecc ## Run the tests, on up to 4 cores
	$(BIN)/pytest --numprocesses=auto --maxprocesses=4

lint: $(BIN)/moecc ## Check format, style and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint test ## Everything that has to be green before a commit

docs: $(BIN)/moecc ## Build the site in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bless: $(BIN)/moecc ## Rewrite the golden files and docs/cli.md; review the diff
	$(BIN)/pytest tests/passes tests/test_cli_golden.py tests/test_cli_page.py --bless

bench: $(BIN)/moecc ## Time one MoE layer beside transformers
	$(BIN)/python -m benchmarks.layer

quick: $(BIN)/moecc ## Check in minutes what all benchmarks compute; times nothing
	$(BIN)/moecc bench all --quick

gpu: $(BIN)/moecc ## Run the tests that need a CUDA device
	$(BIN)/pytest -m gpu

clean: ## Remove the environment and build leftovers
	rm -rf $(VENV) build dist *.egg-info
