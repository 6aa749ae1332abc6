"""Train one stage of a recipe: `python train.py recipe=zephyr-7b-beta stage=dpo objective.beta=0.05`.

The only place that knows Hydra: it composes the configuration, turns it into plain settings, and runs them.
"""

import os
import re
import signal
import sys
from collections.abc import Sequence
from errno import EACCES, EDQUOT, ENAMETOOLONG, ENOSPC, EPERM, EROFS
from functools import partial
from itertools import product
from pathlib import Path
from shutil import which
from types import FrameType
from typing import Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from zephyr import distributed, early
from zephyr.errors import Stopped, UserError
from zephyr.launch import JobFailed, launch
from zephyr.settings import Settings, nearest, parse
from zephyr.sweep import Direction, Sweep, direction

CONF = "conf"
MULTIRUN = ("-m", "--multirun")
ONLY_FLAG = "A sweep takes no other flag than -m."


def job(cfg: DictConfig, sweep: Sweep | None) -> float | None:
    """One run. Returns the metric a sweep compares: held-out preference accuracy, or the SFT loss."""
    try:
        config = as_dict(cfg)
        distributed.adopt_slurm()
        if sweep is not None and not config["dry_run"]:
            return sweep.run(_varied(HydraConfig.get().overrides.task, sweep), config, partial(start, apart=True))
        if sweep is None and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise UserError(ONLY_FLAG)
        return start(config)
    except (UserError, OmegaConfBaseException) as error:  # here, because Hydra would announce it too
        fail(explain(error))
    except JobFailed as error:
        fail(str(error), status=1)
    except Stopped as stopped:
        if sweep is not None:
            raise
        saved = any(Path(cfg.output_dir, "checkpoints").glob("step-*"))
        stop(stopped, "Go on with resume=auto." if saved else "Nothing was saved yet.")


def start(config: dict[str, Any], apart: bool = False) -> float | None:
    """Run in this process, if it is the only one or one of a launcher's, else in new ones. `apart`: in new ones even
    if it is one, so that whatever becomes of it is its own affair."""
    settings = parse(config)
    early.check(settings)
    if settings.dry_run:
        from zephyr.dry_run import report

        print(report(settings))
        return None
    from zephyr.run import chosen, run  # here, so that mistakes are answered without torch

    if distributed.joined():
        return run(settings, config)
    choice = chosen(settings)
    if choice.processes == 1 and not apart:
        return run(settings, config)
    settled = {"devices": choice.devices} | ({} if choice.strategy == "single" else {"strategy": choice.strategy})
    return launch({**config, "trainer": {**config["trainer"], **settled}}, choice.devices)


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
    if re.search(r"Could not find 'hydra/(sweeper|launcher)/(optuna|submitit)", text):
        return "This sweep needs Optuna or submitit: pip install 'zephyr[sweep]'"
    if match := re.match(r"Ambiguous value for argument '(.*)'", text):
        return f"{_unreadable(match.group(1))} To run each of several values, add -m."
    if "override_grammar" in text and (unreadable := _not_an_override()):
        return _unreadable(unreadable)
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
    known = ["stage", "recipe", "trainer", "logger", "sweep"]
    if (stage or chosen.get("stage")) == "dpo":
        known += ["objective", "reference"]
    groups = {group: chosen[group] for group in known if group in chosen}
    groups |= {"stage": stage} if stage else {}
    with hydra.initialize(version_base="1.3", config_path=CONF):
        return hydra.compose("train", [f"{group}={choice}" for group, choice in groups.items() if "," not in choice])


def fail(message: str, status: int = 2) -> NoReturn:
    """Print the message alone, and leave."""
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(status)


def stop(stopped: Stopped, hint: str) -> NoReturn:
    """Say so, and leave with the status of a signal."""
    print(f"Stopped by {stopped.signal.name}. {hint}", file=sys.stderr)
    sys.exit(128 + stopped.signal)


def plan() -> Sweep | None:
    """None of a single run. Of a sweep, what its jobs need to know, once every job is composed and parsed that can be
    known beforehand, so that the last one's mistake does not wait for the others to end."""
    arguments = [argument for argument in sys.argv[1:] if argument not in MULTIRUN]
    multirun = len(arguments) < len(sys.argv[1:])
    if any(argument.startswith("-") for argument in arguments):
        if multirun:
            raise UserError(ONLY_FLAG)
        return None
    arguments += ["hydra.mode=MULTIRUN"] * multirun
    with hydra.initialize(version_base="1.3", config_path=CONF):
        loader = GlobalHydra.instance().config_loader()
        cfg = loader.load_configuration("train", arguments, RunMode.MULTIRUN)
        if cfg.hydra.mode != RunMode.MULTIRUN:
            return None
        if distributed.joined():
            raise UserError("A launcher's every process would make a sweep of its own. Start the sweep without one.")
        if cfg.hydra.launcher._target_.endswith(".SlurmLauncher") and not which("srun"):
            raise UserError("There is no srun here: start the sweep where SLURM takes jobs, or without sweep=slurm.")
        sweeper = cfg.hydra.sweeper
        params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        overrides = OverridesParser.create(loader).parse_overrides([*params, *cfg.hydra.overrides.task])
        keys = {override.get_key_element() for override in overrides if override.is_sweep_override()}
        keys |= {str(key) for key in sweeper.get("params") or {}}
        grid = sweeper._target_.endswith(".BasicSweeper")
        jobs = _jobs(overrides, grid)
        settings = [parse(as_dict(hydra.compose("train", job_overrides))) for job_overrides in jobs]
        if any(job_settings.resume not in (None, "auto") for job_settings in settings):
            raise UserError("resume=CHECKPOINT is for a single run. The jobs of a sweep go on by themselves.")
        sweep = Sweep(Path(cfg.hydra.sweep.dir), frozenset(keys))
    # as a job reckons it, it would depend on what varies
    sys.argv.append(f"hydra.sweep.dir={QuotedString(str(sweep.folder), Quote.single).with_quotes()}")
    if "direction" in sweeper:
        sys.argv.append(f"hydra.sweeper.direction={_direction(settings)}")
    if grid and not cfg.dry_run:
        sweep.expect(_varied(job_overrides, sweep) for job_overrides in jobs)
    return sweep


def _jobs(overrides: Sequence[Override], grid: bool) -> list[list[str]]:
    """The overrides of each job of a grid. Of a sampler's space, so many that every value occurs, but not with every
    value of the other keys."""
    values = {override.get_key_element(): _values(override) for override in overrides}
    length = max(map(len, values.values()), default=1)
    rows = product(*values.values()) if grid else ([v[i % len(v)] for v in values.values()] for i in range(length))
    return [[f"{key}={value}" for key, value in zip(values, row, strict=True)] for row in rows]


def _values(override: Override) -> list[str]:
    """All that an override of a sweep gives its key; of an interval, the ends."""
    if override.is_interval_sweep():
        interval = override.value()
        return [str(interval.start), str(interval.end)]  # type: ignore[union-attr]
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


def _varied(overrides: Sequence[str], sweep: Sweep) -> dict[str, str]:
    pairs = (override.split("=", 1) for override in overrides if "=" in override)
    return {key.lstrip("+"): value.strip("'\"") for key, value in pairs if key in sweep.keys}


def _direction(jobs: Sequence[Settings]) -> Direction:
    """In which direction a sampler has to look for good values of the metric that the jobs return."""
    if any(job.data.validation is None for job in jobs):
        raise UserError("A sampler compares runs by their validation, and data.validation is null.")
    directions = {direction(job.stage) for job in jobs}
    if len(directions) > 1:
        raise UserError("The stages have different metrics, which a sampler cannot compare: sweep one stage.")
    right = directions.pop()
    for argument in sys.argv[1:]:
        if argument.startswith("hydra.sweeper.direction=") and not argument.endswith(f"={right}"):
            raise UserError(f"{argument} would look for the worst: the metric of stage={jobs[0].stage} is to {right}.")
    return right


def main() -> None:
    """The command. Raises what is to be explained."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)
    sweep = plan()

    @hydra.main(version_base="1.3", config_path=CONF, config_name="train")
    def one(cfg: DictConfig) -> float | None:
        return job(cfg, sweep)

    if sweep is None:
        one()
        return
    failed = False
    try:
        one()
    except Exception as error:
        failed = "submitit" in type(error).__module__
        if failed:
            print(f"{str(error).splitlines()[0]}\nSee {sweep.folder}/.submitit.", file=sys.stderr)
        elif "No trials are completed yet" not in str(error):  # Optuna's, which wants to name the best one
            raise
    finally:
        failed = sweep.report() or failed
    if failed:
        sys.exit(1)


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(signum)


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise mistakes to here
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in MULTIRUN)  # Hydra wants it in front
    try:
        main()
    except (HydraException, OmegaConfBaseException, UserError) as error:
        fail(explain(error))
    except Stopped as stopped:
        stop(stopped, "The same command goes on.")
    except OSError as error:
        if error.errno not in (EACCES, EPERM, EROFS, ENOSPC, EDQUOT, ENAMETOOLONG):
            raise
        fail(f"{error.strerror}: {error.filename}")  # no permission, too long a name, a full disk
    except ValueError as error:
        if not str(error).startswith("Config group override"):  # Hydra's, of logger=null
            raise
        fail(explain(error))
