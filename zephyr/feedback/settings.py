"""Every key of `python -m zephyr.feedback`, with its type and unit. Defaults live in conf/feedback.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from zephyr.errors import UserError, reason
from zephyr.feedback.engine import Engine
from zephyr.feedback.local import Local
from zephyr.feedback.pool import Limits, Model, Price, Source
from zephyr.feedback.replay import Replay, recordings
from zephyr.feedback.server import Endpoint
from zephyr.redact import redact
from zephyr.settings import Count, Decay, Must, Portion, Positive, Seed, Text, Wandb, build, nearest

_OURS = {"model", "messages", "stream", "n"}  # an answer is one, whole, and of the model that the record names
_ARGUMENTS = {"extra_headers", "extra_query", "extra_body"}  # of the openai client, no parameters of a server


@dataclass(frozen=True)
class Backend:
    """A model and what answers for it: exactly one of base_url, path and replay."""

    name: Text  # in records and reports
    base_url: Sequence[Text]  # OpenAI-compatible servers
    path: Text | None  # folder of a model or an adapter
    engine: Literal["transformers", "vllm"]  # of a path
    replay: Text | None  # file of completions
    model: Text | None  # what its servers call it; None: the name
    answers_as: Text | None
    api_key_env: Text | None
    structured: bool
    concurrency: Count
    requests_per_minute: Positive | None
    tokens_per_minute: Positive | None
    price: Price
    temperature: Decay | None
    top_p: Annotated[float, Must("in (0, 1]", lambda value: 0 < value <= 1)] | None
    max_tokens: Count | None
    parameters: dict[str, Any]

    @property
    def sampling(self) -> dict[str, Any]:
        """The parameters of its requests. What is null is not sent: some servers refuse what others need."""
        named = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return {name: value for name, value in named.items() if value is not None} | self.parameters

    def pooled(self) -> Model:
        """The model as the client's pool has it."""
        servers: tuple[Source, ...] = tuple(
            Endpoint(url, self.api_key_env, self.concurrency, self.requests_per_minute, self.tokens_per_minute)
            for url in self.base_url
        )
        if self.path:
            servers = ((Engine if self.engine == "vllm" else Local)(Path(self.path), self.concurrency),)
        if self.replay:
            servers = (Replay(self.replay),)
        price = Price() if self.replay else self.price  # it was paid when it was recorded
        return Model(self.name, servers, self.model or self.name, price, self.structured, self.answers_as)


@dataclass(frozen=True)
class Judge:
    """The teacher that rates, and what it is asked."""

    backend: Backend
    rubrics: Text | None  # a folder in place of ours
    critique: bool
    second: bool


@dataclass(frozen=True)
class Feedback:
    """python -m zephyr.feedback"""

    prompts: Text
    output: Text
    seed: Seed
    limit: Count | None  # the first so many prompts
    bad_rows: Literal["error", "drop"]  # what to do with a row that holds no prompt
    models: Sequence[Backend]
    completions: Count  # a prompt
    principles: Text | None  # a file in place of ours
    judge: Judge
    max_cost: Positive | None  # USD
    max_requests: Count | None
    max_failures: Portion
    limits: Limits
    logger: Wandb | None
    dry_run: bool


def parse(config: dict[str, Any]) -> Feedback:
    """Check a composed configuration and turn it into settings. Raises UserError at the first mistake."""
    config = dict(config)
    default, judge, models = config.pop("default"), dict(config["judge"]), listed(config["models"])
    if judge["model"] is None:
        raise UserError("judge.model is not set: give judge.model=VALUE.")
    own = {key: judge.pop(key) for key in ("rubrics", "critique", "second")}
    own["backend"] = backend({"name": judge["model"], **judge}, "judge")  # whose keys stand beside its own in the YAML
    config["judge"] = build(Judge, own, "judge", {"backend": Any})
    config["models"] = [
        _backend(one, f"models[{i}]")
        for i, entry in enumerate(models)
        for one in _every(_over(default, entry, f"models[{i}]"))
    ]
    return build(Feedback, config, "", {"judge": Any})


def listed(models: Any) -> list[Any]:
    """The pool of the command line, or of the YAML file that it names. Raises UserError where that is no list."""
    where = "models"
    if isinstance(models, str):
        where = models
        try:
            models = yaml.safe_load(Path(models).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"models: {where} cannot be read as a list of models: {reason(error)}") from error
    if not isinstance(models, list):
        raise UserError(f"{where} must be a list such as [{{name: m1, base_url: http://...}}], got {redact(models)!r}.")
    return models


def backend(values: dict[str, Any], where: str) -> Backend:
    """A model's group of keys, as conf/backend/ lays it out, with its name. Raises UserError at a mistake in it."""
    return build(Backend, _backend(values, where), where)


def _over(default: dict[str, Any], entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict) or "name" not in entry:
        raise UserError(f"{where} must be a group of keys with a name, got {redact(entry)!r}.")
    for key in entry:
        if key != "name" and key not in default:
            raise UserError(f"{where} has no key {key!r}.{nearest(key, ['name', *default])}")
    return {**default, **entry}


def _every(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """An entry named * stands for every model that its file of completions holds."""
    if entry["name"] != "*" or not isinstance(entry["replay"], str):
        return [entry]
    return [{**entry, "name": name} for name in sorted(recordings(entry["replay"]))]


def _backend(values: dict[str, Any], where: str) -> dict[str, Any]:
    """With one address as a list of one, and limits that stand in the YAML as the client's own."""
    urls = values["base_url"]
    urls = urls if isinstance(urls, list) else [urls] if urls is not None else []
    sources = [
        name for name, given in (("base_url", urls), ("path", values["path"]), ("replay", values["replay"])) if given
    ]
    if len(sources) != 1:
        said = " and ".join(sources) or "none of them"
        raise UserError(f"{where} must have one of base_url, path and replay; it has {said}.")
    if isinstance(values["parameters"], dict) and (ours := sorted(_OURS & values["parameters"].keys())):
        raise UserError(f"{where}.parameters holds {', '.join(ours)}, which the client itself sets. Take it out.")
    if isinstance(values["parameters"], dict) and (no := sorted(_ARGUMENTS & values["parameters"].keys())):
        raise UserError(
            f"{where}.parameters holds {', '.join(no)}, but what stands there goes into a request's body as it is. "
            "Write parameters alone; a key is read from the environment variable that api_key_env names."
        )
    # only servers take a schema
    structured = values["structured"] and bool(urls or (values["path"] and values["engine"] == "vllm"))
    return {**values, "base_url": urls, "structured": structured}
