"""What can be known of a run's files, folders and machine before torch is imported: mistakes in them are answered in a
second, not in ten."""

import logging
import re
from importlib.metadata import version
from pathlib import Path

from zephyr import demo
from zephyr.data import sources
from zephyr.errors import UserError, check_writable
from zephyr.planning.gpus import chosen
from zephyr.settings import Settings

_log = logging.getLogger("zephyr")
_STEP = re.compile(r"step-\d+")  # as zephyr.checkpoints names them


def check(settings: Settings) -> None:
    """Raise UserError at a path of the settings that leads nowhere, or at a GPU that is not known or not there.

    Nothing is written, and what only the hub can know is left to whoever loads it.
    """
    if settings.dry_run:
        chosen(settings.gpu)
        if settings.model.path is not None:
            _check_model(settings.model.path)
        return
    if finished(settings):
        return
    _check_resume(settings.resume)
    output = Path(settings.output_dir)
    check_writable(output, "output_dir")
    start, _ = starting_point(settings)
    _check_model(start)
    if not start.startswith("demo:"):
        check_apart(output, start)
    for key, source in (("data.train", settings.data.train), ("data.validation", validation(settings))):
        if source is not None:
            _check_source(source, key)
    if (prompts := settings.samples.prompts) is not None:
        _check_source(prompts, "samples.prompts")
        if validation(settings) is None and settings.samples.every_n_steps is None:
            raise UserError(
                "samples.prompts are answered at every validation, and there is none. "
                "Set samples.every_n_steps=N, or data.validation=FILE."
            )
    if settings.trainer.accelerator == "gpu" and not _sees_gpu():
        raise UserError("trainer.accelerator=gpu, but torch sees no GPU. Take auto or cpu, or mend the installation.")


def _sees_gpu() -> bool:
    if version("torch").endswith("+cpu"):  # a build that never does, which is known without loading it
        return False
    import torch

    return torch.cuda.is_available()


def finished(settings: Settings) -> bool:
    """Whether a run to go on with is at its end already."""
    return settings.resume == "auto" and Path(settings.output_dir, "summary.json").exists()


def starting_point(settings: Settings) -> tuple[str, str | None]:
    """The model to start from: the one named, else for SFT the recipe's base, for DPO its SFT output."""
    model = settings.model
    if model.path is not None:
        return model.path, model.revision
    base = model.base, model.base_revision
    if settings.stage == "sft":
        return base
    trained = Path("outputs", settings.recipe, "sft", "model")
    if any((trained / name).exists() for name in ("config.json", "adapter_config.json")):
        return str(trained), None
    how = f"python train.py recipe={settings.recipe} stage=sft"
    if not model.base.startswith("demo:"):
        raise UserError(
            f"stage=dpo starts from an SFT model, and {trained} does not exist. Make it with `{how}`, "
            "or name one with model.path=..."
        )
    _log.info("%s does not exist (`%s` makes it): starting from the untrained base model instead.", trained, how)
    return base


def validation(settings: Settings) -> str | None:
    """The validation source: the demo's is left out beside training data of another kind."""
    source = settings.data.validation
    return None if is_demo(source) and not is_demo(settings.data.train) else source


def is_demo(source: str | None) -> bool:
    """Whether a path names a part of the demo."""
    return (source or "").startswith("demo:")


def check_apart(output: Path, start: str) -> None:
    """Raise UserError where a new run would move the model that it starts from aside."""
    if Path(start).resolve().is_relative_to(output.resolve()):
        raise UserError(f"The model to start from, {start}, lies in output_dir={output}. Choose another output_dir.")


def _check_resume(resume: str | None) -> None:
    if resume in (None, "auto"):
        return
    checkpoint = Path(str(resume))
    if not checkpoint.is_dir():
        raise UserError(f"there is no checkpoint at {checkpoint}; resume=auto takes the newest of output_dir.")
    if _STEP.fullmatch(checkpoint.name) is None:
        raise UserError(
            f"resume={checkpoint} is no checkpoint: they are the folders output_dir/checkpoints/step-NUMBER. "
            "resume=auto takes the newest."
        )


def _check_model(path: str) -> None:
    """What zephyr.models.policy.read_config says of a folder without a model."""
    folder = Path(path)
    if is_demo(path):
        _check_demo(path)
    elif not folder.exists() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise UserError(
            f"model.path: the folder {path} does not exist (looked in {Path.cwd()}). A hub id is OWNER/NAME."
        )
    elif folder.exists() and not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        hint = f" Did you mean {folder / 'model'}?" if (folder / "model" / "config.json").exists() else ""
        raise UserError(f"model.path: {path} holds no model (config.json).{hint}")


def _check_source(source: str, key: str) -> None:
    if is_demo(source):
        _check_demo(source)
    else:
        sources.local_files(source, key)


def _check_demo(path: str) -> None:
    if path.removeprefix("demo:") not in demo.FILES:  # otherwise left alone, as it would be built
        demo.locate(path)
