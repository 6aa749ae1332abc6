"""Every key of `python -m zephyr.feedback`, with its type and unit. Defaults live in conf/feedback.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from zephyr.errors import UserError
from zephyr.feedback.pool import Endpoint, Limits, Model, Price
from zephyr.settings import Count, Decay, Must, Portion, Positive, Seed, Text, Wandb, build


@dataclass(frozen=True)
class Backend:
    """A model and what answers for it: exactly one of base_url, path and replay."""

    name: Text  # in records and reports
    base_url: Sequence[Text]  # OpenAI-compatible servers
    path: Text | None  # folder of a model or an adapter
    replay: Text | None  # file of completions
    model: Text | None  # what its servers call it; None: the name
    answers_as: Text | None
    api_key_env: Text | None
    structured: bool
    concurrency: Count
    requests_per_minute: Positive | None
    tokens_per_minute: Positive | None
    price: Price
    temperature: Decay
    top_p: Annotated[float, Must("in (0, 1]", lambda value: 0 < value <= 1)]
    max_tokens: Count
    parameters: dict[str, Any]

    @property
    def sampling(self) -> dict[str, Any]:
        """The parameters of its requests."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            **self.parameters,
        }

    def pooled(self) -> Model:
        """The model as the client's pool has it."""
        servers = tuple(
            Endpoint(url, self.api_key_env, self.concurrency, self.requests_per_minute, self.tokens_per_minute)
            for url in self.base_url
        )
        return Model(self.name, servers, self.model, self.price, self.structured, self.answers_as)


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
    default, judge, models = config.pop("default"), dict(config["judge"]), config["models"]
    if not isinstance(models, list):
        raise UserError(f"models must be a list such as [{{name: m1, base_url: http://...}}], got {models!r}.")
    own = {key: judge.pop(key) for key in ("rubrics", "critique", "second")}
    config["judge"] = {"backend": _backend({"name": judge["model"], **judge}, "judge"), **own}
    config["models"] = [
        _backend(_over(default, entry, f"models[{i}]"), f"models[{i}]") for i, entry in enumerate(models)
    ]
    return build(Feedback, config)


def backend(values: dict[str, Any], where: str) -> Backend:
    """A model's group of keys, as conf/backend/ lays it out, with its name. Raises UserError at a mistake in it."""
    return build(Backend, _backend(values, where), where)


def _over(default: dict[str, Any], entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict) or "name" not in entry:
        raise UserError(f"{where} must be a group of keys with a name, got {entry!r}.")
    return {**default, **entry}


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
    return {**values, "base_url": urls}
