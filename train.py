"""Train one stage of a recipe: `python train.py recipe=zephyr-7b-beta stage=dpo objective.beta=0.05`.

Composes the configuration (Hydra), turns it into plain settings, and runs them: one run, or a sweep of several.
"""

import os
import sys
from collections.abc import Sequence
from errno import EACCES, EDQUOT, ENAMETOOLONG, ENOSPC, EPERM, EROFS
from functools import partial
from itertools import product
from pathlib import Path
from shutil import which
from typing import Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from conf import as_dict, explain
from zephyr import distributed
from zephyr.command import stoppable
from zephyr.errors import Stopped, UserError, check_writable
from zephyr.launching.launch import JobFailed, launch
from zephyr.launching.sweep import Direction, Sweep, direction
from zephyr.running import early
from zephyr.settings import Settings, parse

CONF = "conf"
MULTIRUN = ("-m", "--multirun")
ONLY_FLAG = "A sweep takes no other flag than -m."


def job(cfg: DictConfig, sweep: Sweep | None) -> float | None:
    """One run. Returns the metric a sweep compares: held-out preference accuracy, or the SFT loss."""
    try:
        with stoppable():
            config = as_dict(cfg)
            distributed.adopt_slurm()
            if sweep is not None and not config["dry_run"]:
                return sweep.run(_varied(HydraConfig.get().overrides.task, sweep), config, partial(start, apart=True))
            if sweep is None and HydraConfig.get().mode == RunMode.MULTIRUN:
                raise UserError(ONLY_FLAG)
            return start(config)
    except (UserError, OmegaConfBaseException) as error:  # here, because Hydra would announce it too
        fail(explain(error, "train", sys.argv[1:]))
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
        from zephyr.planning.dry_run import report

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
        if not cfg.dry_run:
            check_writable(sweep.folder, "hydra.sweep.dir")
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


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise mistakes to here
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in MULTIRUN)  # Hydra wants it in front
    try:
        with stoppable():
            main()
    except (HydraException, OmegaConfBaseException, UserError) as error:
        fail(explain(error, "train", sys.argv[1:]))
    except Stopped as stopped:
        stop(stopped, "The same command goes on.")
    except OSError as error:
        if error.errno not in (EACCES, EPERM, EROFS, ENOSPC, EDQUOT, ENAMETOOLONG):
            raise
        fail(f"{error.strerror}: {error.filename}")  # no permission, too long a name, a full disk
    except ValueError as error:
        if not str(error).startswith("Config group override"):  # Hydra's, of logger=null
            raise
        fail(explain(error, "train", sys.argv[1:]))
