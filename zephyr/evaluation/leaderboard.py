"""The Open LLM Leaderboard's six tasks, through lm-eval, with the paper's values beside.

Every task is a run of lm-eval of its own, with exactly the arguments that the `lm_eval` command would pass on for the
same checkpoint, so that both give the same digits. What lm-eval returned is kept in raw.json, task by task: a run that
was stopped goes on with the next task.
"""

import json
import math
import os
import shlex
import signal
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from zephyr.errors import UserError, reason
from zephyr.evaluation.files import write
from zephyr.evaluation.settings import Evaluation

DEVICE = "cuda:0"  # as the `lm_eval` command has it: the CPU where there is none


class Standard(NamedTuple):
    """How the leaderboard of 2023 ran a task, and what it found for Zephyr-7B-beta."""

    title: str
    shots: int
    metric: str  # and filter, as lm-eval names them
    published: float  # per cent
    source: str


_PAPER, _CARD = "Tunstall et al. (2023), table 2", "model card of HuggingFaceH4/zephyr-7b-beta"
STANDARD = {
    "arc_challenge": Standard("ARC", 25, "acc_norm,none", 62.03, _PAPER),
    "hellaswag": Standard("HellaSwag", 10, "acc_norm,none", 84.52, _PAPER),
    "mmlu": Standard("MMLU", 5, "acc,none", 61.44, _PAPER),
    "truthfulqa_mc2": Standard("TruthfulQA", 0, "acc,none", 57.44, _PAPER),
    "winogrande": Standard("Winogrande", 5, "acc,none", 77.74, _CARD),
    "gsm8k": Standard("GSM8K", 5, "exact_match,strict-match", 12.74, _CARD),
}


def check(settings: Evaluation) -> None:
    """Raise UserError at what is wrong before tasks are looked for."""
    if settings.folder is None:
        raise UserError("The leaderboard reads a model's probabilities, so it needs its folder: give that as MODEL.")
    wanted = settings.leaderboard
    if not wanted.tasks:
        raise UserError(f"leaderboard.tasks is empty: give some of {', '.join(STANDARD)}, or others.")
    if wanted.include_path is not None and not Path(wanted.include_path).is_dir():
        raise UserError(f"leaderboard.include_path: there is no folder {wanted.include_path}.")
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise UserError("The leaderboard needs lm-eval: pip install 'zephyr[evaluate]'") from error


def run(settings: Evaluation, folder: Path) -> dict[str, Any]:
    """Scores in per cent by task. Raises UserError where lm-eval, a task, its data or the model cannot be had."""
    check(settings)
    from lm_eval.api.registry import get_model
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from zephyr.models.policy import weights_fingerprint

    wanted = settings.leaderboard
    names = list(dict.fromkeys(wanted.tasks))
    where = arguments(Path(str(settings.folder)))
    asked = {
        "weights": weights_fingerprint(str(settings.folder), None),
        "quantization": wanted.quantization,
        "chat_template": wanted.chat_template,
        "batch_size": wanted.batch_size,
        "limit": settings.limit,
        "lm_eval": version("lm_eval"),
    }
    raw = folder / "raw.json"
    done = _read(raw)
    left = [name for name in names if done.get(name, {}).get("asked") != asked]
    if left:
        manager = TaskManager(include_path=wanted.include_path, metadata=where)
        tasks = {name: _load(manager, name) for name in left}  # all data first: what is missing is told in seconds
        try:
            if wanted.quantization is None:
                model = get_model("hf").create_from_arg_obj(where, _loading(wanted.batch_size))
            else:
                model = _in_four_bits(where, wanted.quantization, wanted.batch_size)
        except Exception as error:  # whatever kind: the files are the user's, and the reason is in the message
            raise UserError(f"lm-eval cannot load {settings.folder}: {reason(error)}") from error
    if left:  # lm-eval ends the processes that draw its resamples by SIGTERM, which is not for us to answer there
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    for name in left:
        found: Any = simple_evaluate(
            model=model,
            tasks=tasks[name],
            num_fewshot=STANDARD[name].shots if name in STANDARD else None,
            batch_size=wanted.batch_size,
            device=DEVICE,
            limit=settings.limit,
            log_samples=False,
            apply_chat_template=wanted.chat_template,
            fewshot_as_multiturn=wanted.chat_template,
            task_manager=manager,
        )
        found["config"] |= {"model": "hf", "model_args": where}
        done[name] = {**_plain(found), "asked": asked}
        write(raw, json.dumps(done, indent=2, ensure_ascii=False) + "\n")

    scores = {name: _score(name, done[name]) for name in names}
    for name, score in scores.items():
        score["command"] = _command(name, where, settings)
    known = [score for name, score in scores.items() if name in STANDARD]
    return {
        "scores": scores,
        "average": _mean([score["score"] for score in known]),  # of the leaderboard's tasks among them
        "published_average": _mean([score["published"] for score in known]),  # of the same
        **{key: value for key, value in asked.items() if key != "weights"},
        "n": sum(score["n"] for score in scores.values()),
        "failed": 0,
    }


def summary(results: dict[str, Any]) -> str:
    """A line a task: our score with its standard error, and the published one."""
    lines = []
    for name, score in results["scores"].items():
        error = "" if score["stderr"] is None else f" ({score['stderr']:.2f})"
        beside = "" if score["published"] is None else f"   Zephyr-7B-beta {score['published']:.2f}"
        ours = "-" if score["score"] is None else f"{score['score']:.2f}"
        lines.append(f"{score['title'] or name:<16}{ours:>7}{error:<8} {score['shots']}-shot{beside}")
    return "\n".join(lines)


def arguments(folder: Path) -> dict[str, str]:
    """lm-eval's model_args for a model's or an adapter's folder.

    The tokenizer is the one stored with the weights that were trained: an adapter's own, which need not add the BOS
    that its base's adds.
    """
    from zephyr.models.lineage import lineage

    start = lineage(str(folder), None)
    if start is None:
        return {"pretrained": str(folder)}
    where = {"pretrained": start.base, "peft": str(folder)}
    if start.base_revision:
        where["revision"] = start.base_revision
    if (folder / "tokenizer_config.json").exists():
        where["tokenizer"] = str(folder)
    return where


def _loading(batch_size: int | str) -> dict[str, Any]:
    return {"batch_size": batch_size, "device": DEVICE}


def _in_four_bits(where: dict[str, str], kind: str, batch_size: int | str) -> Any:
    """lm-eval's model around one whose weights are quantised as they are read.

    lm-eval can name a model that is stored in four bits, but not ask for one: what it would pass on,
    `load_in_4bit=True`, is no argument of transformers 5.
    """
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    base, revision = where["pretrained"], where.get("revision")
    dtype = AutoConfig.from_pretrained(base, revision=revision).dtype or torch.float32
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)
    device = DEVICE if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        base, revision=revision, dtype="auto", quantization_config=bits, device_map={"": device}
    )
    if "peft" in where:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, where["peft"])
    tokenizer = AutoTokenizer.from_pretrained(where.get("tokenizer", base), revision=revision)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _load(manager: Any, name: str) -> list[Any]:
    """A task, group or tag with its data."""
    if name not in manager.all_tasks and not Path(name).is_file():
        raise UserError(
            f"lm-eval has no task {name!r}: see `lm_eval ls tasks`, or give the folder of a YAML that defines it as "
            "leaderboard.include_path."
        )
    try:
        loaded = manager.load([name])
    except Exception as error:  # whatever kind: a task's data may be anywhere, and its YAML may hold code
        raise UserError(
            f"lm-eval cannot load the task {name!r}: {reason(error)} If its data set cannot be downloaded from here, "
            "load the task once where it can, and bring along the folder that HF_HOME names (~/.cache/huggingface); "
            "or give a task with local data (leaderboard.include_path), or leave it out of leaderboard.tasks."
        ) from error
    groups: dict[str, Any] = loaded["groups"]
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _score(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """What goes into results.json for a task; `metrics` are lm-eval's own numbers, with every digit."""
    leaves = [key for key in found["n-samples"] if key in found["results"]]
    metrics = {key: value for key, value in found["results"].get(name, {}).items() if "," in key}
    if not metrics:  # a tag, or a YAML's path: the results stand under the tasks' own names
        metrics = {f"{leaf}/{k}": v for leaf in leaves for k, v in found["results"][leaf].items() if "," in k}
        metrics = metrics if len(leaves) > 1 else {key.split("/", 1)[1]: value for key, value in metrics.items()}
    standard = STANDARD.get(name)
    metric = standard.metric if standard else _first(metrics)
    value = metrics.get(metric) if metric else None
    error = metrics.get(metric.replace(",", "_stderr,", 1)) if metric else None
    parts = [found["results"][leaf].get(metric) for leaf in leaves] if len(leaves) > 1 else []
    return {
        "title": standard.title if standard else None,
        "metric": metric,
        "shots": standard.shots if standard else max(found["n-shot"].values(), default=0),
        "score": _percent(value),
        "stderr": _percent(error),
        # The leaderboard gave each of MMLU's subjects the same weight; lm-eval weighs them by their size.
        "mean_of_parts": _percent(_mean(parts)),
        "published": standard.published if standard else None,
        "source": standard.source if standard else None,
        "n": sum(found["n-samples"][leaf]["effective"] for leaf in leaves),
        "metrics": metrics,
    }


def _first(metrics: dict[str, Any]) -> str | None:
    """acc_norm where there is one, as the leaderboard preferred it, else the first."""
    values = [key for key in metrics if "_stderr," not in key]
    return next((key for key in values if key.startswith("acc_norm,")), next(iter(values), None))


def _percent(value: Any) -> float | None:
    return 100.0 * value if isinstance(value, int | float) and math.isfinite(value) else None


def _mean(values: list[Any]) -> float | None:
    numbers = [value for value in values if isinstance(value, int | float)]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None


def _command(name: str, where: dict[str, str], settings: Evaluation) -> str | None:
    """The `lm_eval` command that gives the same numbers; there is none for a model quantised as it is read."""
    wanted = settings.leaderboard
    if wanted.quantization is not None:
        return None
    words = ["lm_eval", "run", "--model", "hf", "--model_args", ",".join(f"{k}={v}" for k, v in where.items())]
    words += ["--tasks", name, "--batch_size", str(wanted.batch_size)]
    if name in STANDARD:
        words += ["--num_fewshot", str(STANDARD[name].shots)]
    if wanted.include_path:
        words += ["--include_path", wanted.include_path]
    if settings.limit:
        words += ["--limit", str(settings.limit)]
    return shlex.join(words + ["--apply_chat_template"] * wanted.chat_template)


def _plain(found: Any) -> dict[str, Any]:
    """As JSON has it, written as lm-eval writes it."""
    from lm_eval.utils import handle_non_serializable

    plain: dict[str, Any] = json.loads(json.dumps(found, default=handle_non_serializable))
    return plain


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({reason(error)}) Delete it: its tasks are then run again.") from error
    return kept
