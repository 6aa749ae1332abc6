"""One run, from settings to a model folder: load, train, save. The only module that knows all the others."""

import hashlib
import json
import logging
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment
from transformers import PreTrainedTokenizerBase

from zephyr import demo, distributed
from zephyr.checkpoints.checkpoint import Checkpoints, FolderCheckpointIO, newest, verify
from zephyr.checkpoints.interruption import StopOnSignal
from zephyr.command import stoppable
from zephyr.data.modules import ChatData, DataModule, PreferenceData
from zephyr.data.render import Message, load_tokenizer
from zephyr.errors import UserError
from zephyr.export import export
from zephyr.models.lineage import check_lineage, lineage
from zephyr.models.policy import Placement, check_policy, weights_fingerprint
from zephyr.models.reference import AdapterOff, Copy
from zephyr.observe.metrics import MetricsFile, Promptly, read, rewind
from zephyr.observe.plots import draw
from zephyr.observe.progress import Progress
from zephyr.observe.samples import Samples, Scorer
from zephyr.observe.throughput import Throughput
from zephyr.planning import estimate
from zephyr.redact import redact
from zephyr.running import early, rank_log, record
from zephyr.running.assemble import Start, build_task, check_objective, gathered
from zephyr.running.console import speak
from zephyr.running.placement import Choice, choose, placed
from zephyr.running.strategy import Ranks
from zephyr.settings import Settings
from zephyr.training.task import Task

_log = logging.getLogger("zephyr")


def run(settings: Settings, config: dict[str, Any]) -> float | None:
    """Train a stage and leave its model, metrics, plots and summary in `settings.output_dir`.

    Every process of the run calls this; the launcher has set the usual variables if there are several. `config` is the
    resolved configuration, for the record. Returns held-out preference accuracy (dpo) or loss in nats a token (sft),
    None without validation. Raises UserError for the user's mistakes, before weights are loaded, and
    Stopped after a signal, with a checkpoint saved if training had begun.
    """
    speak()
    with stoppable():
        choice = chosen(settings)
        with placed(choice, settings) as placement:
            return _run(settings, config, choice, placement)


def chosen(settings: Settings) -> Choice:
    """The strategy and the processes of a run."""

    def bytes_needed() -> float:
        start, revision = early.starting_point(settings)
        path = demo.locate(start)
        whole = Placement(torch.device("cpu"), settings.trainer.precision)
        return estimate.state(settings, check_policy(path, revision), whole, 1, "copy").total

    return choose(settings.trainer, bytes_needed)


def _run(settings: Settings, config: dict[str, Any], choice: Choice, placement: Placement) -> float | None:
    started = time.monotonic()
    output = Path(settings.output_dir)
    _agree_on(settings)
    if early.finished(settings):
        _log.info("%s is finished already; without resume=auto it is trained anew.", output)
        return record.headline(json.loads((output / "summary.json").read_text())["eval"])
    distributed.from_first(lambda: early.check(settings))
    checkpoint = distributed.from_first(lambda: _checkpoint(settings, output))
    start, revision = early.starting_point(settings)
    path = demo.locate(start)
    model = check_policy(path, revision, settings.model.lora)
    distributed.from_first(lambda: _check_origin(settings, path, revision))

    L.seed_everything(settings.seed, workers=True, verbose=False)
    tokenizer = load_tokenizer(path, revision)
    _check(settings, output, path, model, tokenizer)
    data = _data(settings, tokenizer)
    with distributed.local_first():
        data.load()
    fingerprint = distributed.from_first(lambda: weights_fingerprint(path, revision))
    checkpoints = Checkpoints(
        output / "checkpoints",
        settings.checkpoint.every_n_steps,
        settings.checkpoint.keep,
        claim=record.claim(settings, start, fingerprint, data),
    )
    if checkpoint is not None:
        checkpoints.check(checkpoint)
    work = f"{data.total_steps} steps of {settings.data.batch_size} {data.train.unit}"
    _log.info("%s from %s: %s, %s on %s.", settings.stage.upper(), start, work, choice.strategy, choice.why)
    task = build_task(settings, Start(start, path, revision, model, fingerprint), data, placement, choice)
    if distributed.rank() > 0:
        torch.manual_seed(settings.seed + distributed.rank())  # other dropout masks than the first process has
    if distributed.rank() == 0:  # nothing is written before the model has loaded
        if settings.resume is None:
            _set_aside(output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.yaml").write_text(yaml.safe_dump(redact(config), sort_keys=False, allow_unicode=True))
        finished_steps = -1 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))
        for name in ("metrics.jsonl", "samples.jsonl"):
            rewind(output / name, finished_steps)
        (output / "metrics.jsonl").touch()
    distributed.barrier()
    rank_log.move(output)

    with ExitStack() as closing:
        loggers = _loggers(settings, config, output, data, fresh=checkpoint is None)
        for logger in loggers[1:]:
            closing.callback(logger.experiment.finish)  # type: ignore[attr-defined]
        live = isinstance(getattr(task, "reference", None), Copy | AdapterOff)
        trainer = _trainer(settings, output, data, tokenizer, checkpoints, loggers, choice, placement, live)
        _fit(trainer, task, data, checkpoint, output)
        weights = gathered(task.policy) if placement.mesh is not None else None
        if distributed.rank() > 0:
            return None
        plots = draw(output / "metrics.jsonl", output / "plots")
        summary = record.summary(settings, start, data, output, seconds=time.monotonic() - started)
        card = record.card(settings, start, revision, summary)
        export(task.policy, tokenizer, output / "model", card, state_dict=weights)
        draft = output / "summary.json.tmp"
        draft.write_text(json.dumps(summary, indent=2) + "\n")
        draft.replace(output / "summary.json")  # by which a run is known to be finished
    _log.info("Model: %s. Plots: %s.", output / "model", ", ".join(map(str, plots)))
    return record.headline(summary["eval"])


def _agree_on(settings: Settings) -> None:
    """See that every process trains the same, and let each say in its own log what."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=6).hexdigest()
    if distributed.world_size() > 1:
        groups = {"objective": settings.objective, "optimizer": settings.optimizer}
        values = {f"{g}.{k}": v for g, group in groups.items() if group for k, v in asdict(group).items()}
        _log.info(
            "Process %d of %d, configuration %s: %s",
            distributed.rank(),
            distributed.world_size(),
            digest,
            ", ".join(f"{name}={value}" for name, value in values.items()),
        )
        distributed.all_equal(digest)


def _fit(trainer: L.Trainer, task: Task, data: DataModule, checkpoint: Path | None, output: Path) -> None:
    """Train, with a validation before the first step and one after the last."""
    if checkpoint is not None:
        _log.info("Going on from %s.", checkpoint)
    elif data.validation is not None:
        trainer.validate(task, data, verbose=False)
    trainer.fit(task, data, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)

    def unvalidated() -> bool:
        rows = read(output / "metrics.jsonl")
        return data.validation is not None and data.total_steps not in {r["step"] for r in rows if "eval/loss" in r}

    if distributed.from_first(unvalidated):
        trainer.validate(task, data, verbose=False)


def _checkpoint(settings: Settings, output: Path) -> Path | None:
    """The checkpoint to go on from; None starts at step 0."""
    if settings.resume is None:
        return None
    if settings.resume == "auto":
        return newest(output / "checkpoints")
    checkpoint = Path(settings.resume)
    verify(checkpoint)
    return checkpoint


def _check_origin(settings: Settings, path: str, revision: str | None) -> None:
    """See that an adapter to start from belongs to the recipe's base, as it is now."""
    start = lineage(path, revision)
    if start is None:
        return
    weights = weights_fingerprint(start.base, start.base_revision) if start.base_weights else None
    check_lineage(start, demo.locate(settings.model.base), settings.model.base_revision, weights)
    if start.quantization != settings.model.quantization:
        held = [bits or "whole weights" for bits in (start.quantization, settings.model.quantization)]
        _log.warning("%s was trained over %s; over %s it is not quite the same model.", path, *held)


def _data(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> DataModule:
    kind: type[DataModule] = ChatData if settings.stage == "sft" else PreferenceData
    source = settings.data
    validation = early.validation(settings)
    if validation != source.validation:
        _log.info("data.validation is the demo's, so there is no validation. Set data.validation=FILE to have one.")
    source = replace(source, train=demo.locate(source.train), validation=validation and demo.locate(validation))
    length = settings.trainer.max_epochs, settings.trainer.max_steps
    return kind(source, tokenizer, *length, settings.seed, distributed.rank(), distributed.world_size())


def _check(settings: Settings, output: Path, path: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """What can be known of machine, folders and model before data and weights are read. `model` is its config."""
    check_objective(settings)
    early.check_apart(output, path)
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
    choice: Choice,
    placement: Placement,
    live_reference: bool,
) -> L.Trainer:
    asked = settings.samples
    prompts, answers = data.prompts(asked.count, asked.prompts and demo.locate(asked.prompts))
    samples = Samples(
        tokenizer,
        prompts,
        asked.max_new_tokens,
        output / "samples.jsonl",
        answers,
        asked.every_n_steps,
        beta=settings.objective.beta if settings.objective is not None and live_reference else None,
        scorer=_scorer(settings),
    )
    callbacks = [
        Throughput(reference=live_reference),
        Promptly(next(logger for logger in loggers if isinstance(logger, MetricsFile))),
        Progress(settings.stage.upper(), data.total_steps),
        samples,
        StopOnSignal(checkpoints),
        checkpoints,
    ]
    steps, every = data.total_steps, settings.trainer.eval_every_n_steps
    return L.Trainer(
        accelerator="gpu" if choice.device_type == "cuda" else "cpu",
        devices=choice.devices,
        num_nodes=choice.num_nodes,
        strategy="auto" if choice.strategy == "single" else Ranks(),
        precision="bf16-mixed" if placement.autocast else "32-true",  # dtypes were settled as the weights were loaded
        inference_mode=False,  # a sharded model's gathered weights would be of no use for training afterwards
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


def _scorer(settings: Settings) -> Scorer | None:
    """Of the demo, its teacher; nobody else's answers can be judged by rules."""
    if not early.is_demo(settings.samples.prompts or early.validation(settings)):
        return None
    from zephyr.demo import teacher  # writes the world out, which no other run needs

    def score(conversation: list[Message], answer: str) -> float | None:
        try:
            return teacher.score(conversation[-1]["content"], answer)
        except ValueError:  # not of its world
            return None

    return score


def _set_aside(output: Path) -> None:
    """Make room for a new run: nothing of an earlier one is overwritten or mixed with it."""
    if (output / "metrics.jsonl").exists():
        number = 1
        while (aside := output.with_name(f"{output.name}.{number}")).exists():
            number += 1
        output.rename(aside)
        _log.info("%s held an earlier run, which is now %s.", output, aside)
