"""Train one stage of a recipe: `python train.py recipe=zephyr-7b-beta stage=dpo objective.beta=0.05`.

The only place that knows Hydra: it composes the configuration, turns it into plain settings, and runs them.
"""

import os
import re
import sys
from errno import EACCES, EDQUOT, ENAMETOOLONG, ENOSPC, EPERM, EROFS
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from zephyr import distributed
from zephyr.errors import Stopped, UserError
from zephyr.launch import JobFailed, launch
from zephyr.settings import Settings, nearest, parse

CONF = "conf"
MULTIRUN = ("-m", "--multirun")


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def job(cfg: DictConfig) -> float | None:
    """One run. Returns the metric a sweep compares: held-out preference accuracy, or the SFT loss."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        cfg.output_dir = f"{hydra_config.sweep.dir}/{hydra_config.sweep.subdir}"
    try:
        settings = parse(as_dict(cfg))
        try:
            return start(settings, as_dict(cfg))
        except Stopped as stopped:
            saved = any(Path(cfg.output_dir, "checkpoints").glob("step-*"))
            hint = "Go on with resume=auto." if saved else "Nothing was saved yet."
            print(f"Stopped by {stopped.signal.name}. {hint}", file=sys.stderr)
            sys.exit(128 + stopped.signal)
    except (UserError, OmegaConfBaseException) as error:
        fail(explain(error))


def start(settings: Settings, config: dict[str, Any]) -> float | None:
    """Run here if this is one process of a run, or the only one; else start all of this node's."""
    from zephyr.run import chosen, run  # here, so that a mistake in a setting is answered without torch

    distributed.adopt_slurm()
    if distributed.joined():
        return run(settings, config)
    choice = chosen(settings)
    if choice.processes == 1:
        return run(settings, config)
    settled = {**config["trainer"], "devices": choice.devices, "strategy": choice.strategy}
    return launch({**config, "trainer": settled}, choice.devices)


def as_dict(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration in plain types."""
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def explain(error: Exception) -> str:
    """A mistake in one or two lines: ours as they are, Hydra's and OmegaConf's in our words, with the nearest name."""
    text = str(error).strip()
    if isinstance(error, UserError):
        return text
    if match := re.match(r"Could not override '([^']+)'", text):
        return _unknown(match.group(1).split("@")[0])
    for argument in sys.argv[1:]:
        group, _, value = argument.partition("=")
        choices = _choices(group) if group.isidentifier() else []
        for choice in value.strip("[]").split(",") if choices else ():
            if choice not in choices:
                return f"Unknown {group} {choice!r}. Choose one of: {', '.join(choices)}.{nearest(choice, choices)}"
    if match := re.match(r"Ambiguous value for argument '(.*)'", text):
        return f"{_unreadable(match.group(1))} To run each of several values, add -m."
    if "override_grammar" in text and (argument := _not_an_override()):
        return _unreadable(argument)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set: give {error.full_key}=VALUE."
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {text.splitlines()[0]}."
    return text


def _unknown(name: str) -> str:
    """What to say of a key that the configuration lacks."""
    group, _, key = name.rpartition(".")
    here = _compose()
    known = OmegaConf.select(here, group) if group else here
    for stage in _choices("stage"):
        if _has(_compose(stage), name) or (group and not _has(here, group) and _has(_compose(stage), group)):
            return f"{name} belongs to stage={stage}, and this run is another stage."
    if isinstance(known, DictConfig):
        return f"{group or 'The configuration'} has no key {key!r}.{nearest(key, map(str, known))}"
    if _has(here, group):
        whole = " or ".join(_choices(group)) or f"{{{key}: ..., ...}}"
        return f"{group} is null here, so it has no {key!r}: choose '{group}={whole}'."
    return f"There is no group {group!r}.{nearest(group, map(str, here))}"


def _unreadable(argument: str) -> str:
    """What to say of an argument that Hydra's grammar refuses."""
    key, equals, value = argument.partition("=")
    if not equals:
        return f"Cannot read {argument!r}: write key=value, in quotes as a whole if the value holds a space."
    value = value.strip("'\"=")
    return f"Cannot read {argument!r}. A value with = , ( [ {{ or $ needs two pairs of quotes: '{key}=\"{value}\"'"


def _not_an_override() -> str | None:
    parser = OverridesParser.create()
    for argument in sys.argv[1:]:
        try:
            if not argument.startswith("-"):
                parser.parse_override(argument)
        except HydraException:
            return argument
    return None


def _has(cfg: DictConfig, name: str) -> bool:
    group, _, key = name.rpartition(".")
    node = OmegaConf.select(cfg, group) if group else cfg
    return isinstance(node, DictConfig) and key in list(node)  # `in` the node itself is False for ???


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in Path(__file__).parent.joinpath(CONF, group).glob("*.yaml"))


def _compose(stage: str | None = None) -> DictConfig:
    """The configuration of the command line's groups alone, or of another stage with them."""
    chosen = dict(argument.split("=", 1) for argument in sys.argv[1:] if argument.count("=") == 1)
    groups = {group: chosen[group] for group in ("stage", "recipe", "trainer", "logger") if group in chosen}
    groups |= {"stage": stage} if stage else {}
    with hydra.initialize(version_base="1.3", config_path=CONF):
        return hydra.compose("train", [f"{group}={choice}" for group, choice in groups.items() if "," not in choice])


def fail(message: str) -> NoReturn:
    """Print the message alone, and leave with status 2."""
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(2)


def check_sweep() -> None:
    """Compose and parse every job of a sweep, so that the last one's mistake does not wait for the others to end."""
    overrides = OverridesParser.create().parse_overrides([arg for arg in sys.argv[1:] if not arg.startswith("-")])
    if any(override.key_or_group.startswith("hydra") for override in overrides):
        return  # another sweeper or launcher may read them in another way
    with hydra.initialize(version_base="1.3", config_path=CONF):
        for batch in BasicSweeper.split_arguments(overrides, max_batch_size=None):
            for job_overrides in batch:
                parse(as_dict(hydra.compose("train", list(job_overrides))))


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise mistakes to here
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in MULTIRUN)  # Hydra wants it in front
    try:
        if sys.argv[1:] and sys.argv[1] in MULTIRUN:
            check_sweep()
        job()
    except (HydraException, OmegaConfBaseException, UserError) as error:
        fail(explain(error))
    except JobFailed as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in (EACCES, EPERM, EROFS, ENOSPC, EDQUOT, ENAMETOOLONG):
            raise
        fail(f"{error.strerror}: {error.filename}")  # no permission, too long a name, a full disk
    except ValueError as error:
        if not str(error).startswith("Config group override"):  # Hydra's, of logger=null
            raise
        fail(explain(error))
