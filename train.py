"""Train one stage of a recipe: `python train.py recipe=zephyr-7b-beta stage=dpo objective.beta=0.05`.

The only place that knows Hydra: it composes the configuration, turns it into plain settings, and runs them.
"""

import os
import re
import sys
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zephyr.errors import UserError
from zephyr.settings import nearest, parse

CONF = "conf"


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def job(cfg: DictConfig) -> float | None:
    """One run. Returns the metric a sweep compares: held-out preference accuracy, or the SFT loss."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        cfg.output_dir = f"{hydra_config.sweep.dir}/{hydra_config.sweep.subdir}"
    try:
        settings = parse(as_dict(cfg))
        from zephyr.interruption import Stopped
        from zephyr.run import run  # here, so that a mistake in a setting is answered without torch

        try:
            return run(settings, as_dict(cfg))
        except Stopped as stopped:
            print(f"Stopped by {stopped.signal.name}. Go on with resume=auto.", file=sys.stderr)
            sys.exit(128 + stopped.signal)
    except (UserError, OmegaConfBaseException) as error:
        fail(str(error))


def as_dict(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration in plain types."""
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def explain(error: Exception) -> str:
    """Hydra's and OmegaConf's messages in one or two lines, with the nearest name where one was misspelt."""
    text = str(error).strip()
    if match := re.match(r"Could not override '([^']+)'", text):
        name = match.group(1).split("@")[0]
        group, _, key = name.rpartition(".")
        known = OmegaConf.select(_defaults(), group) if group else _defaults()
        if not isinstance(known, DictConfig):
            return f"There is no group {group!r} here (stage=dpo has an objective, stage=sft has none)."
        return f"{group or 'The configuration'} has no key {key!r}.{nearest(key, map(str, known))}"
    if match := re.search(r"Could not find '(\w+)/([^']+)'", text):
        group, choice = match.groups()
        choices = sorted(f[:-5] for f in os.listdir(f"{os.path.dirname(__file__) or '.'}/{CONF}/{group}") if f.endswith(".yaml"))
        return f"Unknown {group} {choice!r}. Choose one of: {', '.join(choices)}.{nearest(choice, choices)}"
    return text


def _defaults() -> DictConfig:
    groups = [arg for arg in sys.argv[1:] if re.match(r"(stage|recipe|trainer|logger)=\w[\w-]*$", arg)]
    with hydra.initialize(version_base="1.3", config_path=CONF):
        return hydra.compose("train", groups)


def fail(message: str) -> NoReturn:
    """Print the message alone, and leave with status 2."""
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise mistakes to here
    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error))
