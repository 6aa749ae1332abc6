"""ms-swift's DPO trainer over rows without padding: a contender of benchmarks.gpu, where it can run.

It imports what TRL has no longer from 1.0 on, and takes the constructor from TRL's trainer when imported: it needs an
environment of its own. Its command line allows such rows with flash-attn alone. On a CPU its trainer is given them with
transformers' attention, whose mask is dense: good to compare losses with, not times. It processes a prompt twice.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import loops, machine
from benchmarks.shapes import perturb_adapter
from benchmarks.tokens import word_tokenizer
from zephyr.data.batch import Pair


def missing(device: str) -> str | None:
    """Why it cannot run here."""
    found = machine.versions()
    if "ms-swift" not in found:
        return "ms-swift is not installed"
    if int(found.get("trl", "1").split(".")[0]) >= 1:
        return "ms-swift does not import beside this TRL: it needs one below 1.0"
    if device == "cuda" and find_spec("flash_attn") is None:
        return "ms-swift packs with flash-attn alone, which is not installed"
    return None


def rows(pair: Pair) -> dict[str, Any]:
    """A pair as ms-swift's collator takes it: each completion with its prompt, of which no token is scored."""
    row: dict[str, Any] = {}
    for side, ids in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        row[f"{side}_input_ids"] = pair.prompt + ids
        row[f"{side}_labels"] = [-100] * len(pair.prompt) + ids
        row[f"{side}_length"] = len(pair.prompt) + len(ids)
    return row


def loop(
    dtype: torch.dtype, pieces: int, job: loops.Job, record: loops.Record, folder: Path, ended: Callable[[], None]
) -> None:
    """Its own loop, with weights of this dtype, without checkpointing, a step in so many pieces."""
    from peft import get_peft_model
    from swift.model import get_model_processor
    from swift.rlhf_trainers.arguments import DPOConfig
    from swift.rlhf_trainers.dpo_trainer import DPOTrainer
    from swift.template import get_template
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(job.policy))
    config.save_pretrained(folder)
    word_tokenizer(config.vocab_size).save_pretrained(folder)
    _, processor = get_model_processor(str(folder), load_model=False, model_type="mistral", use_hf=True)
    kind = {"dtype": dtype, "attn_implementation": "sdpa" if job.device == "cpu" else "flash_attention_2"}

    def load(path: Path) -> Any:
        model = AutoModelForCausalLM.from_pretrained(str(path), **kind)
        model.model_info, model.model_meta = processor.model_info, processor.model_meta
        return model

    model = load(job.reference if job.lora else job.policy)
    if job.lora:
        model = get_peft_model(model, loops.peft_adapter())
        perturb_adapter(model)
    template = get_template(processor, template_type="dummy", padding_free=True)
    template.set_mode("rlhf")
    options: dict[str, Any] = {
        **loops.common_options(job, folder),
        "per_device_train_batch_size": len(job.steps[0]) // pieces,
        "gradient_accumulation_steps": pieces,
        "gradient_checkpointing": False,
        "adam_beta2": 0.999,
        "beta": loops.BETA,
        "loss_type": ["sigmoid"],
        "train_dataloader_shuffle": False,
        "dataloader_num_workers": 0,
        "remove_unused_columns": False,
        "check_model": False,
    }
    given = {"template": template, "train_dataset": [rows(pair) for step in job.steps for pair in step]}
    frozen = None if job.lora else load(job.reference)
    trainer = DPOTrainer(model=model, ref_model=frozen, args=DPOConfig(**options), **given)
    loops.run_trainer(trainer, record, ended)
