"""Checkpoints that are whole or absent: one folder a step, committed by a rename, verified before use.

    checkpoints/step-00000500/
        state.pt                  all that Lightning hands over but big tensors; read with weights_only=True
        shard-00000.safetensors   weights and optimizer state: what this process wrote of them (shards.py)
        MANIFEST.json             size and BLAKE2b digest of every file, step, versions, and a seal over itself

Any number of processes reads what any other number wrote, sharded or not. A folder is written as `.tmp-*` beside its
final place and deleted as `.del-*`: a process killed at any moment leaves nothing incomplete under a step's name.
`aside-*` folders are steps that no longer belong to the run.
"""

import hashlib
import io
import json
import logging
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from zephyr import __version__, distributed
from zephyr.checkpoints.randomness import random_state, set_random_state
from zephyr.checkpoints.shards import Stored, change, fault, join, put, split, write
from zephyr.errors import UserError

log = logging.getLogger(__name__)

STATE, MANIFEST = "state.pt", "MANIFEST.json"
STEP = re.compile(r"step-(\d+)")

_Value = TypeVar("_Value")
_verified: dict[Path, Any] = {}  # folder -> what its files were when they were found whole


def verify(folder: Path) -> None:
    """Raise UserError, naming the file, unless every byte of the checkpoint is as it was written.

    What this process has verified, and nobody has written to since, it does not read again.
    """
    manifest, sealed = _manifest(folder)
    files = {folder / name: written for name, written in manifest["files"].items()}
    state = sealed, [file.exists() and file.stat().st_ctime_ns for file in files]
    if _verified.get(folder.absolute()) == state:
        return
    with ThreadPoolExecutor(8) as pool:  # 1 GB/s each
        for file, found in zip(files, pool.map(fault, files, files.values()), strict=True):
            if found:
                raise _damaged(folder, file.name, found)
    _verified[folder.absolute()] = state


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
    """Reads and writes checkpoint folders for Lightning, on every process of the run."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Commit `checkpoint` to the folder `path`, or log an error and leave no trace if the disk will not.

        All processes call this, and none returns before the commit. A whole checkpoint that is there already stays;
        a damaged one is moved aside.

        Raises:
            TypeError: `checkpoint` holds an object that weights_only=True would refuse to read back.
        """
        target, first = Path(path), distributed.rank() == 0
        staging = _of_every_rank(_beside(target, ".tmp"))[0]
        try:
            _together(lambda: _begin(staging) if first else None)
            files = _together(lambda: _write(checkpoint, staging))
            written = {name: facts for part in files for name, facts in part.items()}
            _together(lambda: _commit(staging, target, checkpoint, written) if first else None)
        except OSError as error:
            if first:
                log.error(f"no checkpoint at {target}: {error}. Training goes on.")
        finally:
            if first:
                shutil.rmtree(staging, ignore_errors=True)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify the folder (UserError if damaged) and read all of it, always with weights_only=True."""
        checkpoint = self.open(path)
        whole = change(_big(checkpoint), lambda _, value: value.whole() if isinstance(value, Stored) else value)
        return checkpoint | whole

    def open(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """The checkpoint with a Stored for each big tensor. All processes call this; rank 0 verifies."""
        folder = Path(path)
        distributed.from_first(lambda: verify(folder))
        manifest, _ = _manifest(folder)
        shards = [folder / name for name in manifest["files"] if name != STATE]
        checkpoint: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        return checkpoint | join(_big(checkpoint), shards)

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
        self._optimizers: list[str] | None = None

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
        state = self._before_validation if self._unvalidated else random_state()
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
        checkpoint["optimizers"] = [type(optimizer).__name__ for optimizer in trainer.optimizers]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._optimizers = checkpoint["optimizers"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        here = [type(optimizer).__name__ for optimizer in trainer.optimizers]
        if self._optimizers not in (None, here):  # sharded weights are stepped by AdamW, whatever the claim
            raise UserError(
                f"the checkpoint holds the state of {self._optimizers}, which {here} cannot go on from."
                " Resume with the strategy that wrote it."
            )

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
        self._before_validation = random_state()

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
            set_random_state(states[trainer.global_rank])


def _begin(staging: Path) -> None:
    """Make the folder, unless one more checkpoint, judged by the one before, would not fit (OSError)."""
    last = _steps(staging.parent)[-1:]
    needed = 1.2 * sum(file.stat().st_size for step in last for file in step.iterdir())
    if last and (free := shutil.disk_usage(staging.parent).free) < needed:
        raise OSError(f"{free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB needed")
    staging.mkdir(parents=True)


def _big(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return {name: checkpoint[name] for name in ("state_dict", "optimizer_states") if name in checkpoint}


def _write(checkpoint: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write this process's files; returns size and digest of each."""
    placeholders, tensors = split(_big(checkpoint))
    files = {}
    if distributed.rank() == 0:
        files[STATE] = put(folder / STATE, [_state(checkpoint | placeholders)])
    shard = f"shard-{distributed.rank():05d}.safetensors"
    if (facts := write(tensors, folder / shard)) is not None:
        files[shard] = facts
    return files


def _state(checkpoint: dict[str, Any]) -> memoryview:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        raise TypeError(
            f"the checkpoint holds {culprit[1] if culprit else 'an object'} that weights_only=True does not"
            " read: put only tensors and plain values into state_dict and on_save_checkpoint"
        ) from error
    return buffer.getbuffer()


def _commit(staging: Path, target: Path, checkpoint: dict[str, Any], files: dict[str, Any]) -> None:
    versions = {name: version(name) for name in ("torch", "lightning", "transformers")} | {"zephyr": __version__}
    manifest = {"step": checkpoint.get("global_step"), "files": files, "versions": versions}
    put(staging / MANIFEST, [_seal(manifest)])
    _sync(staging)
    if target.exists():
        try:
            return verify(target)
        except UserError as error:
            log.error(f"{error} Writing it anew.")
            os.replace(target, _beside(target, "aside"))
    os.replace(staging, target)  # the commit point
    _sync(target.parent)


def _manifest(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The manifest and its bytes; UserError unless its seal is whole."""
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
    return manifest, sealed


def _seal(manifest: dict[str, Any]) -> bytes:
    """The manifest as bytes that end in a digest of themselves; the only spelling of it that verifies."""
    body = {name: value for name, value in manifest.items() if name != "seal"}
    digest = hashlib.blake2b(json.dumps(body).encode(), digest_size=32).hexdigest()
    return json.dumps({**body, "seal": digest}, indent=1).encode()


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


def _together(action: Callable[[], _Value]) -> list[_Value]:
    """What `action` returns on each rank. If it raises on any, all raise: OSError unless something else went wrong."""
    value: Any = None
    failure: Exception | None = None
    try:
        value = action()
    except Exception as error:
        failure = error
    outcomes = _of_every_rank((value, None if failure is None else str(failure), isinstance(failure, OSError)))
    faults = [(of_disk, rank, text) for rank, (_, text, of_disk) in enumerate(outcomes) if text is not None]
    if not faults:
        return [made for made, _, _ in outcomes]
    if failure is not None and (len(outcomes) == 1 or not isinstance(failure, OSError)):
        raise failure
    of_disk, rank, text = min(faults)
    raise (OSError if of_disk else RuntimeError)(f"rank {rank}: {text}")


def _of_every_rank(value: _Value) -> list[_Value]:
    """The values of all ranks, on each of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
