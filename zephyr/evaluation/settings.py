"""Every key of `python -m zephyr.evaluate`, with its type and unit. Defaults live in conf/evaluate.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from zephyr import demo
from zephyr.chat import find_model
from zephyr.errors import UserError
from zephyr.feedback.pool import Limits
from zephyr.feedback.settings import Backend, backend
from zephyr.settings import Count, Decay, Positive, Seed, Text, Wandb, build

Benchmark = Literal["mt_bench", "alpaca_eval", "leaderboard", "preferences"]


@dataclass(frozen=True)
class Answering:
    """The model under test. What a benchmark prescribes holds where these two are None."""

    backend: Backend
    temperature: Decay | None
    max_tokens: Count | None  # of an answer

    def sampling(self, temperature: float, max_tokens: int) -> dict[str, Any]:
        """The parameters of a request, from what the benchmark prescribes."""
        chosen = temperature if self.temperature is None else self.temperature
        return {**self.backend.sampling, "temperature": chosen, "max_tokens": self.max_tokens or max_tokens}


@dataclass(frozen=True)
class MtBench:
    """MT-Bench (Zheng et al., 2023), by FastChat's files."""

    questions: Text | None
    references: Text | None
    answers: Text | None
    judgments: Text | None
    mode: Literal["single", "pair"]
    baseline: Text | None
    judge_prompts: Text | None


@dataclass(frozen=True)
class AlpacaEval:
    """AlpacaEval (Li et al., 2023; Dubois et al., 2024), by the official tool's files."""

    baseline: Text | None
    prompts: Text | None
    outputs: Text | None
    annotations: Text | None
    style: Literal["choice", "weighted"]
    prompt: Text | None
    seed: Seed


@dataclass(frozen=True)
class Leaderboard:
    """The Open LLM Leaderboard's tasks, through lm-eval."""

    tasks: Sequence[Text]
    include_path: Text | None  # folder of task YAMLs
    batch_size: Count | Literal["auto"]
    quantization: Literal["nf4"] | None
    chat_template: bool


@dataclass(frozen=True)
class Preferences:
    """Accuracy on preference pairs."""

    data: Text | None
    reference: Text | None
    score: Literal["auto", "reward", "sum", "mean"]
    beta: Positive
    max_length: Count  # tokens of a prompt and one completion
    max_prompt_length: Count
    system: str | None
    micro_batch_tokens: Count
    quantization: Literal["auto", "none", "nf4"]
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true"]
    seed: Seed


@dataclass(frozen=True)
class Evaluation:
    """python -m zephyr.evaluate"""

    name: Text  # the model's, in files and reports
    folder: Text | None  # of the model, where it is a local one
    output: Text
    benchmarks: Sequence[Benchmark]
    limit: Count | None
    answer: Answering | None  # None: there is no model, only files of what one said
    judge: Backend | None
    mt_bench: MtBench
    alpaca_eval: AlpacaEval
    leaderboard: Leaderboard
    preferences: Preferences
    max_cost: Positive | None  # USD
    max_requests: Count | None
    limits: Limits
    logger: Wandb | None

    def the_model(self) -> Answering:
        """The model under test. Raises UserError where none is given."""
        if self.answer is None:
            raise UserError(
                "no model to ask: python -m zephyr.evaluate MODEL with a model's folder, or with answer.base_url=..."
            )
        return self.answer

    def the_judge(self) -> Backend:
        """Who judges. Raises UserError where nobody is given."""
        if self.judge is None:
            raise UserError("no judge: give judge.base_url and judge.model (or judge.path, or judge.replay).")
        return self.judge


def parse(config: dict[str, Any]) -> Evaluation:
    """Check a composed configuration and turn it into settings. Raises UserError at the first mistake."""
    config = dict(config)
    model, answer, judge = config.pop("model"), dict(config["answer"]), dict(config["judge"])
    name = answer.pop("name")
    served = bool(answer["base_url"] or answer["replay"])
    folder = None
    if not served and (given := answer["path"] or model) is not None:
        folder = find_model(Path(given))
        answer["path"] = str(folder)
    if name is None and folder is not None:
        name = _called(given, folder)
    name = name or model or answer["model"]
    if served and name is None:
        raise UserError("which model? Give its name: python -m zephyr.evaluate MODEL answer.base_url=...")
    config |= {"name": name or "model", "folder": str(folder) if folder else None}
    config["output"] = config["output"] or _beside(folder if folder and Path(given).exists() else None)
    if config["benchmarks"] == []:
        raise UserError(f"benchmarks is empty: give some of {', '.join(get_args(Benchmark))}.")
    config["answer"] = _answering({"name": name, **answer, "model": answer["model"] or model if served else None})
    config["judge"] = backend({"name": _judge_name(judge), **judge}, "judge") if _given(judge) else None
    for benchmark in ("mt_bench", "alpaca_eval", "preferences"):
        config[benchmark] = {key: _located(value) for key, value in config[benchmark].items()}
    limits = build(Limits, config["limits"], "limits")
    kinds = {"answer": Any, "judge": Any, "limits": Any}
    return build(Evaluation, {**config, "limits": limits}, "", kinds)


def _located(value: Any) -> Any:
    """A file of the demo by its real path; anything else as it is."""
    return demo.locate(value) if isinstance(value, str) else value


def _answering(values: dict[str, Any]) -> Answering | None:
    if not _given(values):
        return None
    own = {key: values[key] for key in ("temperature", "max_tokens")}
    filled = {**values, "temperature": own["temperature"] or 0.0, "max_tokens": own["max_tokens"] or 1}
    return build(Answering, {"backend": backend(filled, "answer"), **own}, "answer", {"backend": Any})


def _judge_name(judge: dict[str, Any]) -> str:
    if not judge["model"] and not judge["path"]:
        raise UserError("judge.model is not set: give what the judge's server calls it, or for a file any name.")
    return judge["model"] or Path(judge["path"]).resolve().name


def _given(values: dict[str, Any]) -> bool:
    return any(values[source] for source in ("base_url", "path", "replay"))


def _called(given: str, folder: Path) -> str:
    """A model's name: of its run, of its folder, or on the hub."""
    if not Path(given).exists():
        return given.split("/")[-1].split("@")[0]
    return folder.resolve().parent.name if folder.name == "model" else folder.resolve().name


def _beside(folder: Path | None) -> str:
    """Where the results of a local model go: into the folder of its run, or its own where it has none."""
    if folder is None:
        raise UserError("output is not set: give output=FOLDER, as there is no model's own folder to put results into.")
    return str((folder.parent if folder.name == "model" else folder) / "evaluation")
