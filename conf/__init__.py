"""Every default of every command, and how a command line becomes a plain configuration.

This and train.py, which adds sweeps, are all that knows Hydra.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from zephyr.errors import UserError
from zephyr.settings import nearest

FOLDER = Path(__file__).parent


def compose(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The configuration of a command other than train.py, in plain types. Raises UserError at a mistake in it."""
    try:
        return as_dict(_composed(command, [_quoted(argument) for argument in arguments]))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, command, arguments)) from error


def describe(command: str) -> str:
    """The defaults of a command with what they mean, as its file and those of its groups hold them."""
    path = FOLDER / f"{command}.yaml"
    text = path.read_text(encoding="utf-8")
    groups: dict[Path, list[str]] = {}  # file: where its keys are put
    for entry in (OmegaConf.to_container(OmegaConf.create(text)) or {}).get("defaults", []):  # type: ignore[union-attr]
        for name, option in entry.items() if isinstance(entry, dict) else ():
            group, _, place = name.partition("@")
            groups.setdefault(path.parent / group / f"{option}.yaml", []).append(place or group)
    parts = [f"# {', '.join(places)}\n{file.read_text(encoding='utf-8')}" for file, places in groups.items()]
    return "\n".join([text, *parts])


def as_dict(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration in plain types."""
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def choices(group: str) -> list[str]:
    """The names of a group's files."""
    return sorted(path.stem for path in (FOLDER / group).glob("*.yaml"))


def explain(error: Exception, command: str, arguments: Iterable[str]) -> str:
    """A mistake in one or two lines: ours as they are, Hydra's and OmegaConf's in our words, with the nearest name."""
    arguments = list(arguments)
    text = str(error).strip()
    if isinstance(error, UserError):
        return text
    if match := re.match(r"Could not override '([^']+)'", text):
        return _unknown(match.group(1).split("@")[0], command, arguments)
    for argument in arguments if command == "train" else ():
        group, _, value = argument.partition("=")
        names = choices(group) if group.isidentifier() else []
        for choice in value.strip("[]").split(",") if names else ():
            if choice not in names:
                return f"Unknown {group} {choice!r}. Choose one of: {', '.join(names)}.{nearest(choice, names)}"
    if re.search(r"Could not find 'hydra/(sweeper|launcher)/(optuna|submitit)", text):
        return "This sweep needs Optuna or submitit: pip install 'zephyr[sweep]'"
    if match := re.match(r"Ambiguous value for argument '(.*)'", text):
        return f"{_unreadable(match.group(1))}{' To run each of several values, add -m.' if command == 'train' else ''}"
    if "override_grammar" in text and (unreadable := _not_an_override(arguments)):
        return _unreadable(unreadable)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set: give {error.full_key}=VALUE."
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {text.splitlines()[0]}."
    return text


def _composed(command: str, overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str((FOLDER / command).parent)):
        return hydra.compose(Path(command).name, overrides)


def _quoted(argument: str) -> str:
    """The override, its value quoted where Hydra's grammar would not take it as the text that it is: gap>=1.5.

    A group of keys may hold new ones (parameters={seed: 1}), which Hydra takes for mistakes unless they are added; the
    settings find the mistakes among them.
    """
    key, equals, value = argument.partition("=")
    if value[:1] == "{" and key[:1] not in ("+", "~"):
        return f"++{argument}"
    if not equals or value[:1] in ("", "[", "{", "'", '"'):
        return argument
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return f"{key}={QuotedString(value, Quote.single).with_quotes()}"
    return argument


def _unknown(name: str, command: str, arguments: list[str]) -> str:
    """What to say of a key that the configuration lacks."""
    group, _, key = name.rpartition(".")
    here = _with_groups(command, arguments)
    known = OmegaConf.select(here, group) if group else here
    for stage in choices("stage") if command == "train" else ():
        other = _with_groups(command, arguments, stage)
        if _has(other, name) or (group and not _has(here, group) and _has(other, group)):
            return f"{name} belongs to stage={stage}, and this run is another stage."
    if isinstance(known, DictConfig):
        return f"{group or 'The configuration'} has no key {key!r}.{nearest(key, map(str, known))}"
    if _has(here, group):
        whole = " or ".join(choices(group)) or f"{{{key}: ..., ...}}"
        return f"{group} is null here, so it has no {key!r}: choose '{group}={whole}'."
    return f"There is no group {group!r}.{nearest(group, map(str, here))}"


def _with_groups(command: str, arguments: list[str], stage: str | None = None) -> DictConfig:
    """The configuration of the command line's groups alone, or of another stage with them."""
    if command != "train":
        return _composed(command, [])
    chosen = dict(argument.split("=", 1) for argument in arguments if argument.count("=") == 1)
    known = ["stage", "recipe", "trainer", "logger", "sweep"]
    if (stage or chosen.get("stage")) == "dpo":
        known += ["objective", "reference"]
    groups = {group: chosen[group] for group in known if group in chosen}
    groups |= {"stage": stage} if stage else {}
    return _composed(command, [f"{group}={choice}" for group, choice in groups.items() if "," not in choice])


def _has(cfg: DictConfig, name: str) -> bool:
    group, _, key = name.rpartition(".")
    node = OmegaConf.select(cfg, group) if group else cfg
    return isinstance(node, DictConfig) and key in list(node)  # `in` the node itself is False for ???


def _unreadable(argument: str) -> str:
    """What to say of an argument that Hydra's grammar refuses."""
    key, equals, value = argument.partition("=")
    if not equals:
        return f"Cannot read {argument!r}: write key=value, in quotes as a whole if the value holds a space."
    value = value.strip("'\"=")
    return f"Cannot read {argument!r}. A value with = , ( [ {{ or $ needs two pairs of quotes: '{key}=\"{value}\"'"


def _not_an_override(arguments: list[str]) -> str | None:
    parser = OverridesParser.create()
    for argument in arguments:
        try:
            if not argument.startswith("-"):
                parser.parse_override(argument)
        except HydraException:
            return argument
    return None
