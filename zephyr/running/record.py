"""What a run says of itself: its claim, its summary, its model's card."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from zephyr.data.modules import DataModule
from zephyr.export import Card
from zephyr.observe.metrics import read
from zephyr.settings import Settings


def claim(settings: Settings, start: str, weights: str, data: DataModule) -> dict[str, Any]:
    """What makes two runs the same run: a checkpoint of one that differs in it is refused."""
    sections = {
        "optimizer": settings.optimizer,
        "objective": settings.objective,
        "reference": settings.reference,
        "model.lora": settings.model.lora,
    }
    made: dict[str, Any] = {
        f"{section}.{key}": value
        for section, values in sections.items()
        if values is not None
        for key, value in asdict(values).items()
        if (section, key) != ("reference", "mode")  # another way to the same numbers
    }
    return made | {
        "stage": settings.stage,
        "seed": settings.seed,
        "model.path": start,
        "weights at the start": weights,
        "model.quantization": settings.model.quantization,
        "data.batch_size": settings.data.batch_size,
        "trainer.precision": settings.trainer.precision,
        "total steps": data.total_steps,
        "tokenised training data": data.fingerprints["train"],
    }


def summary(settings: Settings, path: str, data: DataModule, output: Path, seconds: float) -> dict[str, Any]:
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


def card(settings: Settings, path: str, revision: str | None, summary: dict[str, Any]) -> Card:
    """The model card: where it comes from, the main numbers, the last metrics."""
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


def headline(evaluation: dict[str, float]) -> float | None:
    """The metric by which runs are compared: held-out preference accuracy, or else the loss."""
    return evaluation.get("eval/rewards/accuracies", evaluation.get("eval/loss"))
