"""Weights & Biases, online with an account and offline without; never a prompt."""

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zephyr.errors import UserError
from zephyr.redact import redact

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger


def wandb_logger(
    output_dir: Path,
    config: dict[str, Any],
    fingerprints: dict[str, str],
    project: str,
    name: str | None = None,
    group: str | None = None,
    tags: list[str] | None = None,
    fresh: bool = False,
) -> "WandbLogger":
    """The run of `start` as Lightning's logger, with the data's fingerprints in its config under `fingerprints`.

    Ranks but the first get a logger without a run. Close it with `logger.experiment.finish()`.
    """
    from lightning.pytorch.loggers import WandbLogger  # seconds, which a run without training need not take
    from lightning.pytorch.utilities import rank_zero_only

    run = None
    if getattr(rank_zero_only, "rank", 0) == 0:
        run = start(output_dir, {**config, "fingerprints": fingerprints}, project, name, group, tags, fresh)
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(project=project, save_dir=output_dir, experiment=run)


def start(
    output_dir: Path,
    config: dict[str, Any],
    project: str,
    name: str | None = None,
    group: str | None = None,
    tags: list[str] | None = None,
    fresh: bool = False,
) -> Any:
    """Start a run in `output_dir/wandb`, or go on with the one whose id `output_dir/wandb_run_id` holds.

    The config is uploaded without secrets. WANDB_MODE decides between online, offline and disabled; without it the
    run is online if wandb finds credentials. `fresh` starts a new run whatever the file says.

    Raises UserError when wandb is missing or a logged-in run cannot be started.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError("logger=wandb needs wandb: pip install wandb, or choose another logger.") from error
    try:
        return wandb.init(
            project=project,
            name=name,
            group=group,
            tags=tags,
            dir=output_dir,
            id=_run_id(output_dir / "wandb_run_id", fresh),
            resume="allow",
            mode=_mode(),
            config=redact(config),
            settings=wandb.Settings(
                console="off",
                reinit="create_new",  # the next job of a sweep in this process must not join this run
                x_disable_meta=True,  # it holds the command line, and with it every override
            ),
        )
    except wandb.Error as error:
        mend = "Set WANDB_MODE=offline to log without the network, and sync the run later."
        raise UserError(f"W&B did not start: {error} {mend}") from error


def _mode() -> Any:
    """What WANDB_MODE or `wandb offline` chose, else offline unless there are credentials; asks nobody."""
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup().settings
    if settings.mode != "online":
        return settings.mode
    found = wbauth.authenticate_session(
        host=settings.base_url, source="zephyr", prompt=False, verify=False, update_session=False
    )
    return "online" if found else "offline"


def _run_id(path: Path, fresh: bool) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if fresh or not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
