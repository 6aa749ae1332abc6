"""Checkpoints that are whole or absent: one folder a step, committed by a rename, verified before use.

    checkpoints/step-00000500/
        state.pt              all that Lightning hands over but the weights; read with weights_only=True
        weights.safetensors   the weights; tied tensors are stored once, their other names in the header
        MANIFEST.json         size and BLAKE2b digest of both files, step, versions, and a seal over itself

A folder is written as `.tmp-*` beside its final place and deleted as `.del-*`: a process killed at any moment
leaves nothing incomplete under a step's name. `aside-*` folders are steps that no longer belong to the run.
"""

import hashlib
import json
import logging
import math
import os
import pickle
import random
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from zephyr import __version__
from zephyr.errors import UserError

log = logging.getLogger(__name__)

STATE, WEIGHTS, MANIFEST = "state.pt", "weights.safetensors", "MANIFEST.json"
STEP = re.compile(r"step-(\d+)")


def verify(folder: Path) -> None:
    """Raise UserError, naming the file, unless every byte of the checkpoint is as it was written."""
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint at {folder}; resume=auto takes the newest of output_dir.")
    try:
        sealed = (folder / MANIFEST).read_bytes()
        manifest = json.loads(sealed)
        if _seal(manifest) != sealed:
            raise ValueError("the seal is broken")
    except FileNotFoundError:
        raise _damaged(folder, MANIFEST, "is missing") from None
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(folder, MANIFEST, f"cannot be trusted: {error}") from None
    for name, written in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
            if size != written["size"]:
                raise _damaged(folder, name, f"has {size} bytes, {written['size']} were written")
            if _digest(folder / name) != written["blake2b"]:
                raise _damaged(folder, name, "is not what was written: its checksum differs")
        except FileNotFoundError:
            raise _damaged(folder, name, "is missing") from None
        except OSError as error:
            raise _damaged(folder, name, f"cannot be read: {error.strerror}") from None


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of `folder`, or None; warns of every damaged one that it passes over."""
    for step in reversed(_steps(folder)):
        try:
            verify(step)
        except UserError as error:
            rank_zero_warn(f"{error} Passing over it to the checkpoint before.")
        else:
            return step
    return None


class FolderCheckpointIO(CheckpointIO):
    """Reads and writes checkpoint folders for Lightning, on the ranks where Lightning asks for it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Commit `checkpoint` to the folder `path`, or log an error and leave no trace if the disk will not.

        A whole checkpoint that is there already stays; a damaged one is moved aside.

        Raises:
            TypeError: `checkpoint` holds an object that weights_only=True would refuse to read back.
        """
        target = Path(path)
        needed, free = _room(target.parent)
        if free < needed:
            space = f"{free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB needed"
            return log.error(f"no checkpoint at {target}: {space}. Training goes on; free some space.")
        staging = _beside(target, ".tmp")
        try:
            staging.mkdir(parents=True)
            _write(checkpoint, staging)
            if target.exists():
                try:
                    return verify(target)
                except UserError as error:
                    log.error(f"{error} Writing it anew.")
                    os.replace(target, _beside(target, "aside"))
            os.replace(staging, target)  # the commit point
            _sync(target.parent)
        except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch.save, of a full disk
            log.error(f"no checkpoint at {target} ({free / 2**20:.0f} MiB free): {error}. Training goes on.")
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify the folder (UserError if damaged) and read it, always with weights_only=True."""
        folder = Path(path)
        verify(folder)
        checkpoint: dict[str, Any] = torch.load(folder / STATE, map_location=map_location or "cpu", weights_only=True)
        weights = load_file(folder / WEIGHTS)
        with safe_open(folder / WEIGHTS, "pt") as file:
            ties: dict[str, str] = file.metadata() or {}
        checkpoint["state_dict"] |= weights | {name: weights[kept] for name, kept in ties.items()}
        return checkpoint

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete the folder, which loses its step's name first."""
        doomed = _beside(Path(path), ".del")
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


class Checkpoints(Checkpoint):
    """Saves every `every_n_steps` optimizer steps and at the end of training, and keeps the newest `keep`.

    `claim` says what the run is, in plain values ("objective.beta": 0.1); to resume, it must be unchanged.
    Being a `Checkpoint`, it runs after all other callbacks: their states are then those of the finished step.
    """

    # A step that ends in a validation is saved after it. Lightning validates after on_train_batch_end, and
    # resuming from a checkpoint made there takes that validation for done: it would be lost to whoever was
    # killed in the middle of it. A run that has to stop before its validation is over marks its checkpoint
    # instead (on_save_checkpoint), and the resumed run begins with the validation.

    def __init__(self, folder: str | os.PathLike[str], every_n_steps: int, keep: int, claim: dict[str, Any]) -> None:
        if every_n_steps < 1 or keep < 1:
            raise UserError(f"checkpoint.every_n_steps={every_n_steps}, checkpoint.keep={keep}: at least 1.")
        self.folder, self.every_n_steps, self.keep, self.claim = Path(folder), every_n_steps, keep, claim
        self.wanted = False  # StopOnSignal wants this step saved, due or not
        self._unvalidated = False
        self._before_validation: dict[str, Any] = {}
        self._resumed: list[dict[str, Any]] | None = None

    def check(self, checkpoint: Path) -> None:
        """Raise UserError unless the checkpoint makes the same claim; cheap enough to ask before all else."""
        state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True, mmap=True)
        _compare(state["callbacks"][self.state_key]["claim"], self.claim)

    def save(self, trainer: Trainer, validated: bool = True) -> None:
        """Save the finished step, then prune; not `validated`, the resumed run begins with its validation."""
        self._unvalidated, self.wanted = not validated, False
        target = self.folder / f"step-{trainer.global_step:08d}"
        if trainer.strategy.broadcast(target.exists()):
            return
        trainer.save_checkpoint(target)
        if trainer.is_global_zero and target.exists():
            for old in _steps(self.folder)[: -self.keep]:
                trainer.strategy.remove_checkpoint(old)

    def state_dict(self) -> dict[str, Any]:
        state = self._before_validation if self._unvalidated else _random_state()
        return {"claim": self.claim, "random": _of_every_rank(state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        _compare(state_dict["claim"], self.claim)
        self._resumed = state_dict["random"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._unvalidated:
            # Lightning's own sign of a validation that broke off in its first batch
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for span in ("total", "current"):
                progress[span] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = _beside(self.folder / "probe", ".tmp")
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            reason = f"cannot write checkpoints to {self.folder}: {error.strerror}"
            raise UserError(f"{reason}. Choose another output_dir.") from None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for leftover in [*self.folder.glob(".tmp-*"), *self.folder.glob(".del-*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        for step in _steps(self.folder):
            if _number(step) > trainer.global_step:  # as the newest it would outlive what this run saves
                aside = _beside(step, "aside")
                os.replace(step, aside)
                start = f"which starts from step {trainer.global_step}"
                rank_zero_warn(f"{step} is not part of this run, {start}: it was moved to {aside.name}.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._restore(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        validates = (
            trainer.enable_validation
            and sum(trainer.num_val_batches) > 0
            and trainer.global_step % (trainer.val_check_batch or math.inf) == 0
        )
        if not validates:
            self._save_if_due(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore(trainer)
        # after the validation loader has drawn its seed: when resumed, it will have drawn one again
        self._before_validation = _random_state()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and trainer.global_step > 0:
            self._save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def _save_if_due(self, trainer: Trainer) -> None:
        # the last step waits for on_train_end, where Lightning's loops know that they are done
        if (self.wanted or trainer.global_step % self.every_n_steps == 0) and not trainer.is_last_batch:
            self.save(trainer)

    def _restore(self, trainer: Trainer) -> None:
        states, self._resumed = self._resumed, None
        if states is not None and trainer.global_rank < len(states):
            _set_random_state(states[trainer.global_rank])


def _write(checkpoint: dict[str, Any], folder: Path) -> None:
    state_dict = checkpoint.get("state_dict", {})
    weights, ties = _untie({name: value for name, value in state_dict.items() if isinstance(value, Tensor)})
    rest = {name: value for name, value in state_dict.items() if not isinstance(value, Tensor)}
    torch.save({**checkpoint, "state_dict": rest}, folder / STATE)
    try:
        torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        raise TypeError(
            f"the checkpoint holds {culprit[1] if culprit else 'an object'} that weights_only=True does not"
            " read: put only tensors and plain values into state_dict and on_save_checkpoint"
        ) from error
    save_file(weights, folder / WEIGHTS, metadata=ties)
    files = {}
    for name in (STATE, WEIGHTS):
        _sync(folder / name)
        files[name] = {"size": (folder / name).stat().st_size, "blake2b": _digest(folder / name)}
    versions = {name: version(name) for name in ("torch", "lightning", "transformers")} | {"zephyr": __version__}
    manifest = {"step": checkpoint.get("global_step"), "files": files, "versions": versions}
    (folder / MANIFEST).write_bytes(_seal(manifest))
    _sync(folder / MANIFEST)
    _sync(folder)


def _untie(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that share no memory, and for each name left out the name of the same tensor that was kept."""
    kept: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    views: dict[Any, str] = {}
    storages = set()
    for name, value in tensors.items():
        tensor = value.detach().cpu()
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() > 0 and value.device.type == "cpu" and view in views:
            ties[name] = views[view]
            continue
        shared = tensor.untyped_storage().data_ptr() in storages
        kept[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        storages.add(tensor.untyped_storage().data_ptr())
        views[view] = name
    return kept, ties


def _seal(manifest: dict[str, Any]) -> bytes:
    """The manifest as bytes that end in a digest of themselves; the only spelling of it that verifies."""
    body = {name: value for name, value in manifest.items() if name != "seal"}
    digest = hashlib.blake2b(json.dumps(body).encode(), digest_size=32).hexdigest()
    return json.dumps({**body, "seal": digest}, indent=1).encode()


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _damaged(folder: Path, name: str, how: str) -> UserError:
    return UserError(
        f"the checkpoint {folder} is damaged: {name} {how}."
        " Resume from another one; resume=auto takes the newest that is whole."
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _number(step: Path) -> int:
    return int(step.name.removeprefix("step-"))


def _steps(folder: Path) -> list[Path]:
    """Folders that bear a step's name, whole or not, oldest step first."""
    return sorted((path for path in folder.glob("step-*") if STEP.fullmatch(path.name)), key=_number)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f"{kind}-{path.name}-{uuid4().hex[:8]}")


def _room(folder: Path) -> tuple[float, int]:
    """Bytes that one more checkpoint needs, judged by the one before (0 if there is none), and bytes free."""
    last = _steps(folder)[-1:]
    needed = 1.2 * sum(file.stat().st_size for step in last for file in step.iterdir())
    return needed, shutil.disk_usage(folder).free if last else 0


def _compare(stored: dict[str, Any], claim: dict[str, Any]) -> None:
    changed = [
        f"  {name}: {stored.get(name, '(not set)')} -> {claim.get(name, '(not set)')}"
        for name in sorted(stored.keys() | claim.keys())
        if (name in stored, stored.get(name)) != (name in claim, claim.get(name))
    ]
    if changed:
        raise UserError(
            "\n".join(["this is not the run that wrote the checkpoint:", *changed])
            + "\nPut these back to go on, or start a new output_dir from that run's weights: model.path=..."
        )


def _random_state() -> dict[str, Any]:
    """States of this process's generators, in types that weights_only=True reads."""
    mersenne = np.random.get_state(legacy=False)
    mersenne["state"]["key"] = mersenne["state"]["key"].tolist()
    on_cuda = torch.cuda.is_initialized()
    return {
        "python": random.getstate(),
        "numpy": mersenne,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if on_cuda else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    mersenne = state["numpy"]
    key = np.array(mersenne["state"]["key"], dtype=np.uint32)
    np.random.set_state({**mersenne, "state": {**mersenne["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _of_every_rank(state: dict[str, Any]) -> list[dict[str, Any]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states
