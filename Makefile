# The commands of the README. They install into .venv first; a GPU machine gets the CUDA build of torch, others
# whatever build pip finds for them.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-feedback test setup check

demo: setup
	$(BIN)/python train.py
	$(BIN)/python train.py stage=dpo
	$(BIN)/python -m zephyr.demo

# A third model, from feedback on what the SFT model itself says: its checkpoints answer, the demo's teacher rates.
OWN := outputs/demo/feedback
STEPS := outputs/demo/sft/checkpoints

demo-feedback: setup outputs/demo/dpo/model
	rm -rf $(OWN)
	$(BIN)/python -m zephyr.demo.serve last=outputs/demo/sft late=$(STEPS)/step-00000300 middle=$(STEPS)/step-00000200 -- \
	  $(BIN)/python -m zephyr.feedback prompts=demo:prompts.jsonl limit=1000 output=$(OWN) models=zephyr/demo/pool.yaml \
	  default.base_url={url} default.max_tokens=64 judge.base_url={url} judge.model=teacher
	$(BIN)/python -m zephyr.prepare ultrafeedback input=$(OWN)/feedback.jsonl output=$(OWN)/pairs \
	  splits.test_prefs=100 splits.test_sft=0 splits.test_gen=0
	$(BIN)/python train.py stage=dpo data.train=$(OWN)/pairs:train_prefs data.validation=$(OWN)/pairs:test_prefs \
	  optimizer.lr=1e-4 trainer.max_epochs=3 output_dir=outputs/demo/dpo-feedback
	$(BIN)/python -m zephyr.demo

outputs/demo/dpo/model:
	$(MAKE) demo

test: setup .venv/tests
	$(BIN)/python -m pytest

setup: .venv/installed

check: setup .venv/tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/tests: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@
