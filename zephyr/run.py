"""One run, from settings to a model folder: load, train, save. The only module that knows all the others."""

import json
import logging
import os
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from zephyr import demo
from zephyr.checkpoint import STEP, Checkpoints, FolderCheckpointIO, newest, verify
from zephyr.data.modules import ChatData, DataModule, PreferenceData
from zephyr.data.render import load_tokenizer
from zephyr.dpo import DPO
from zephyr.errors import UserError
from zephyr.export import Card, export
from zephyr.interruption import StopOnSignal, stoppable
from zephyr.models.policy import check_policy, load_policy, weights_fingerprint
from zephyr.observe.metrics import MetricsFile, read, rewind
from zephyr.observe.plots import draw
from zephyr.observe.progress import Progress
from zephyr.observe.samples import Samples
from zephyr.observe.throughput import Throughput
from zephyr.redact import redact
from zephyr.settings import Settings
from zephyr.sft import SFT
from zephyr.task import Task

_log = logging.getLogger("zephyr")


def run(settings: Settings, config: dict[str, Any]) -> float | None:
    """Train a stage and leave its model, metrics, plots and summary in `settings.output_dir`.

    `config` is the resolved configuration, for the record. Returns held-out preference accuracy (dpo) or loss in nats
    a token (sft), None without validation. Raises UserError for the user's mistakes, before weights are loaded, and
    zephyr.interruption.Stopped after a signal, with a checkpoint saved if training had begun.
    """
    with stoppable():
        return _run(settings, config)


def _run(settings: Settings, config: dict[str, Any]) -> float | None:
    _speak()
    started = time.monotonic()
    output = Path(settings.output_dir)
    if settings.resume == "auto" and (output / "summary.json").exists():
        _log.info("%s is finished already; without resume=auto it is trained anew.", output)
        return _headline(json.loads((output / "summary.json").read_text())["eval"])
    checkpoint = _checkpoint(settings, output)
    start, revision = _starting_point(settings)
    path = demo.locate(start)
    model = check_policy(path, revision, settings.model.lora)

    if settings.trainer.threads is not None:
        torch.set_num_threads(settings.trainer.threads)
    L.seed_everything(settings.seed, workers=True, verbose=False)
    tokenizer = load_tokenizer(path, revision)
    _check(settings, output, path, model, tokenizer)
    data = _data(settings, tokenizer)
    data.load()
    checkpoints = Checkpoints(
        output / "checkpoints",
        settings.checkpoint.every_n_steps,
        settings.checkpoint.keep,
        claim=_claim(settings, start, path, data),
    )
    if checkpoint is not None:
        checkpoints.check(checkpoint)
    work = f"{data.total_steps} steps of {settings.data.batch_size} {data.train.unit}"
    _log.info("%s from %s: %s.", settings.stage.upper(), start, work)
    task = _task(settings, path, revision, data)
    if settings.resume is None:  # nothing is written before the model has loaded
        _set_aside(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(redact(config), sort_keys=False, allow_unicode=True))
    finished_steps = 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))
    for name in ("metrics.jsonl", "samples.jsonl"):
        rewind(output / name, -1 if checkpoint is None else finished_steps)
    (output / "metrics.jsonl").touch()

    loggers = _loggers(settings, config, output, data, fresh=checkpoint is None)
    trainer = _trainer(settings, output, data, tokenizer, checkpoints, loggers)
    try:
        _fit(trainer, task, data, checkpoint, output)
        plots = draw(output / "metrics.jsonl", output / "plots")
        summary = _summary(settings, start, data, output, seconds=time.monotonic() - started)
        export(task.policy, tokenizer, output / "model", _card(settings, start, revision, summary))
        (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    finally:
        for logger in trainer.loggers[1:]:
            logger.experiment.finish()  # type: ignore[attr-defined]
    _log.info("Model: %s. Plots: %s.", output / "model", ", ".join(map(str, plots)))
    return _headline(summary["eval"])


def _fit(trainer: L.Trainer, task: Task, data: DataModule, checkpoint: Path | None, output: Path) -> None:
    """Train, with a validation before the first step and one after the last."""
    if checkpoint is not None:
        _log.info("Going on from %s.", checkpoint)
    elif data.validation is not None:
        trainer.validate(task, data, verbose=False)
    trainer.fit(task, data, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
    validated = {row["step"] for row in read(output / "metrics.jsonl") if "eval/loss" in row}
    if data.validation is not None and data.total_steps not in validated:
        trainer.validate(task, data, verbose=False)


def _checkpoint(settings: Settings, output: Path) -> Path | None:
    """The checkpoint to go on from; None starts at step 0."""
    if settings.resume is None:
        return None
    if settings.resume == "auto":
        return newest(output / "checkpoints")
    checkpoint = Path(settings.resume)
    if checkpoint.is_dir() and STEP.fullmatch(checkpoint.name) is None:
        raise UserError(
            f"resume={checkpoint} is no checkpoint: they are the folders output_dir/checkpoints/step-NUMBER. "
            "resume=auto takes the newest."
        )
    verify(checkpoint)
    return checkpoint


def _starting_point(settings: Settings) -> tuple[str, str | None]:
    """The model to start from: the one named, else for SFT the recipe's base, for DPO its SFT output."""
    model = settings.model
    if model.path is not None:
        return model.path, model.revision
    base = model.base, model.base_revision
    if settings.stage == "sft":
        return base
    trained = Path("outputs", settings.recipe, "sft", "model")
    if any((trained / name).exists() for name in ("config.json", "adapter_config.json")):
        return str(trained), None
    how = f"python train.py recipe={settings.recipe} stage=sft"
    if not model.base.startswith("demo:"):
        raise UserError(
            f"stage=dpo starts from an SFT model, and {trained} does not exist. Make it with `{how}`, "
            "or name one with model.path=..."
        )
    _log.info("%s does not exist (`%s` makes it): starting from the untrained base model instead.", trained, how)
    return base


def _data(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> DataModule:
    kind: type[DataModule] = ChatData if settings.stage == "sft" else PreferenceData
    source = settings.data
    validation = source.validation
    if (validation or "").startswith("demo:") and not source.train.startswith("demo:"):
        _log.info("data.validation is the demo's, so there is no validation. Set data.validation=FILE to have one.")
        validation = None
    source = replace(source, train=demo.locate(source.train), validation=validation and demo.locate(validation))
    return kind(source, tokenizer, settings.trainer.max_epochs, settings.trainer.max_steps, settings.seed)


def _check(settings: Settings, output: Path, path: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """What can be known of machine, folders and model before data and weights are read. `model` is its config."""
    if settings.trainer.accelerator == "gpu" and not torch.accelerator.is_available():
        raise UserError("trainer.accelerator=gpu, but torch sees no GPU. Take auto or cpu, or mend the installation.")
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"Cannot write to output_dir={output}: {existing} is not a folder that you may write to.")
    if Path(path).resolve().is_relative_to(output.resolve()):
        raise UserError(f"The model to start from, {path}, lies in output_dir={output}. Choose another output_dir.")
    positions = getattr(model, "max_position_embeddings", None) or settings.data.max_length
    if settings.data.max_length > positions:
        raise UserError(f"data.max_length={settings.data.max_length} exceeds the {positions} positions of {path}.")
    if len(tokenizer) > model.vocab_size:
        raise UserError(
            f"The tokenizer of {path} has {len(tokenizer)} tokens, but its model only {model.vocab_size}: "
            "they do not belong together. Get the whole model again."
        )
    full_dpo = settings.stage == "dpo" and settings.model.lora is None and not settings.model.base.startswith("demo:")
    if full_dpo and settings.optimizer.lr > 1e-5:
        _log.warning("optimizer.lr=%g is typical of SFT; DPO of all weights usually takes 5e-7.", settings.optimizer.lr)


def _task(settings: Settings, path: str, revision: str | None, data: DataModule) -> Task:
    model = settings.model
    dtype = torch.bfloat16 if settings.trainer.precision == "bf16-true" else torch.float32
    policy = load_policy(path, revision, dtype, model.lora, model.quantization, model.activation_checkpointing)
    steps_per_epoch = len(data.train.lengths) / settings.data.batch_size
    if settings.objective is None:
        return SFT(policy, settings.optimizer, data.total_steps, steps_per_epoch)
    return DPO(policy, settings.optimizer, data.total_steps, steps_per_epoch, objective=settings.objective)


def _loggers(settings: Settings, config: dict[str, Any], output: Path, data: DataModule, fresh: bool) -> list[Logger]:
    loggers: list[Logger] = [MetricsFile(output)]
    if (wandb := settings.logger) is not None:
        from zephyr.observe.weights_and_biases import wandb_logger

        loggers.append(
            wandb_logger(
                output, config, data.fingerprints, wandb.project, wandb.name, wandb.group, wandb.tags, fresh=fresh
            )
        )
    return loggers


def _trainer(
    settings: Settings,
    output: Path,
    data: DataModule,
    tokenizer: PreTrainedTokenizerBase,
    checkpoints: Checkpoints,
    loggers: list[Logger],
) -> L.Trainer:
    prompts, answers = data.prompts(settings.samples.count)
    samples = Samples(tokenizer, prompts, settings.samples.max_new_tokens, output / "samples.jsonl", answers)
    callbacks = [
        Throughput(reference=settings.stage == "dpo"),
        Progress(settings.stage.upper(), data.total_steps),
        samples,
        StopOnSignal(checkpoints),
        checkpoints,
    ]
    steps, every = data.total_steps, settings.trainer.eval_every_n_steps
    return L.Trainer(
        accelerator=settings.trainer.accelerator,
        devices=settings.trainer.devices,
        precision=settings.trainer.precision,
        max_epochs=1,  # the loader yields every step of the run
        log_every_n_steps=min(settings.trainer.log_every_n_steps, steps),
        val_check_interval=steps if every is None else min(every, steps),
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if data.validation is not None else 0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=loggers,
        plugins=[FolderCheckpointIO(), LightningEnvironment()],
        use_distributed_sampler=False,
        enable_model_summary=False,
        default_root_dir=output,
    )


def _claim(settings: Settings, start: str, path: str, data: DataModule) -> dict[str, Any]:
    """What makes two runs the same run: a checkpoint of one that differs in it is refused."""
    sections = {"optimizer": settings.optimizer, "objective": settings.objective, "model.lora": settings.model.lora}
    claim: dict[str, Any] = {
        f"{section}.{key}": value
        for section, values in sections.items()
        if values is not None
        for key, value in asdict(values).items()
    }
    return claim | {
        "stage": settings.stage,
        "seed": settings.seed,
        "model.path": start,
        "weights at the start": weights_fingerprint(path),
        "model.quantization": settings.model.quantization,
        "data.batch_size": settings.data.batch_size,
        "trainer.precision": settings.trainer.precision,
        "total steps": data.total_steps,
        "tokenised training data": data.fingerprints["train"],
    }


def _set_aside(output: Path) -> None:
    """Make room for a new run: nothing of an earlier one is overwritten or mixed with it."""
    if (output / "metrics.jsonl").exists():
        number = 1
        while (aside := output.with_name(f"{output.name}.{number}")).exists():
            number += 1
        output.rename(aside)
        _log.info("%s held an earlier run, which is now %s.", output, aside)


def _summary(settings: Settings, path: str, data: DataModule, output: Path, seconds: float) -> dict[str, Any]:
    """The run in figures: the last values of train/*, and the first and last of eval/*."""
    rows = read(output / "metrics.jsonl")
    train = [row for row in rows if "train/loss" in row]
    evaluations = [
        {name: value for name, value in row.items() if name.startswith("eval/")} for row in rows if "eval/loss" in row
    ]
    reports = {"train": data.train, "validation": data.validation}
    return {
        "recipe": settings.recipe,
        "stage": settings.stage,
        "started_from": path,
        "steps": data.total_steps,
        "seconds": round(seconds, 1),
        "train": train[-1] if train else {},
        "eval_at_start": evaluations[0] if evaluations else {},
        "eval": evaluations[-1] if evaluations else {},
        "data": {
            name: {**examples.report._asdict(), "examples": len(examples.lengths), "unit": examples.unit}
            for name, examples in reports.items()
            if examples is not None
        },
    }


def _card(settings: Settings, path: str, revision: str | None, summary: dict[str, Any]) -> Card:
    data, optimizer = settings.data, settings.optimizer
    training = {
        "optimizer steps": summary["steps"],
        f"{summary['data']['train']['unit']} a step": data.batch_size,
        "longest sequence (tokens)": data.max_length,
        "optimizer": optimizer.name,
        "peak learning rate": optimizer.lr,
        "schedule": f"{optimizer.schedule}, {optimizer.warmup_ratio:.0%} warm-up",
        "precision": settings.trainer.precision,
        "seed": settings.seed,
    }
    if settings.objective is not None:
        training |= {"objective": settings.objective.name, "beta": settings.objective.beta}
    if settings.model.lora is not None:
        training |= {"LoRA rank": settings.model.lora.rank, "LoRA alpha": settings.model.lora.alpha}
    return Card(
        name=f"{settings.recipe}-{settings.stage}",
        stage=settings.stage,
        base_model=path,
        base_revision=revision,
        datasets=[data.train.partition("@")[0]],
        fingerprints={split: report["fingerprint"] for split, report in summary["data"].items()},
        training=training,
        metrics={name: value for name, value in {**summary["train"], **summary["eval"]}.items() if "/" in name},
    )


def _headline(evaluation: dict[str, float]) -> float | None:
    return evaluation.get("eval/rewards/accuracies", evaluation.get("eval/loss"))


def _speak() -> None:
    """Let Zephyr speak on standard error, one plain line at a time, and Lightning only when something is wrong."""
    if not _log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        _log.addHandler(handler)
        _log.setLevel(logging.INFO)
        _log.propagate = False
    for noisy in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    disable_progress_bar()
    for noise in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own, on torch 2.13
        r"Found \d+ module\(s\) in eval mode",  # the reference, as it should be
        r".*dataloader is not resumable",  # it is: the data module keeps the position
        r"The '\w+_dataloader' does not have many workers",  # packing is fast enough in the loop
    ):
        warnings.filterwarnings("ignore", noise)
