"""What an adapter's folder says of its origin, and whether a later stage fits that.

PEFT's adapter_config.json names the base and its revision. Beside it, lineage.json tells the rest: which weights the
base had, and how it was held in training.
"""

import json
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from zephyr.errors import UserError, reason

RECORD = "lineage.json"
_HARMLESS = (True, False, "gaussian", "orthogonal", "eva")  # initialisations that leave the base as it is


class Lineage(NamedTuple):
    """What an adapter was trained on."""

    base: str  # folder or hub id
    base_revision: str | None  # a hub commit
    base_weights: str | None = None  # fingerprint of a local base's weights; a hub model is told by its revision
    quantization: str | None = None  # nf4, or None where the base was whole
    double_quantization: bool = False
    dtype: str | None = None  # of the base in training, such as bfloat16
    folder: Path = Path()  # of the adapter itself


def lineage(path: str, revision: str | None) -> Lineage | None:
    """What the adapter in a folder, or of a hub id, was trained on; None if `path` is no adapter.

    Raises UserError for an adapter of another kind than LoRA, or one that is damaged.
    """
    if Path(path).is_dir():
        folder = Path(path)
    elif path.count("/") == 1 and not path.startswith((".", "/", "~")):
        try:
            if find_adapter_config_file(path, revision=revision) is None:
                return None
            folder = Path(snapshot_download(path, revision=revision, allow_patterns=["adapter_*", RECORD]))
        except OSError:
            return None  # whoever loads it says why it cannot be had
    else:
        return None
    if not (folder / "adapter_config.json").is_file():
        return None
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        base, base_revision = config["base_model_name_or_path"], config.get("revision")
        record = folder / RECORD
        known = json.loads(record.read_text()) if record.exists() else {}
        found = Lineage(base, base_revision, **known, folder=folder)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"The adapter in {path} is damaged ({reason(error)}) Get or train it again.") from error
    if not base:
        raise UserError(f"{folder / 'adapter_config.json'} names no base. Write it into base_model_name_or_path.")
    for key, allowed in (("peft_type", ("LORA",)), ("bias", ("none",)), ("init_lora_weights", _HARMLESS)):
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"The adapter in {path} has {key}={config[key]!r}, which is not supported.")
    if config.get("modules_to_save"):
        raise UserError(f"The adapter in {path} also changes whole modules (modules_to_save), which is not supported.")
    return found


def check_lineage(start: Lineage, base: str, base_revision: str | None, base_weights: str | None = None) -> None:
    """Raise UserError if an adapter was trained on another base than a recipe names, or if that has changed since.

    `base_weights` is the fingerprint of the base's weights as they are now.
    """
    if not (start.base == base or (Path(base).is_dir() and Path(start.base).resolve() == Path(base).resolve())):
        raise UserError(
            f"The adapter in {start.folder} was trained on {start.base}, but model.base={base}. "
            f"An adapter fits its own base alone: set model.base={start.base}, or start from another model."
        )
    known = start.base_revision
    if base_revision and known not in (None, base_revision) and commit(base, base_revision) != known:
        raise UserError(
            f"The adapter in {start.folder} was trained on revision {known} of {start.base}, but "
            f"model.base_revision={base_revision}. Set model.base_revision={known}."
        )
    if base_weights and start.base_weights and base_weights != start.base_weights:
        raise UserError(
            f"The weights in {start.base} have changed since the adapter in {start.folder} was trained on them "
            f"(fingerprint {start.base_weights}, now {base_weights}). Put them back, or train the adapter again."
        )


def save_record(origin: Lineage, folder: Path) -> None:
    """Write what PEFT's own file has no field for beside it."""
    record = {key: value for key, value in origin._asdict().items() if key not in ("base", "base_revision", "folder")}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def commit(base: str, revision: str) -> str:
    """The commit that a branch or tag of a hub model stands for, as far as can be known; else what was given."""
    if Path(base).is_dir():
        return revision
    try:
        return extract_commit_hash(cached_file(base, "config.json", revision=revision), None) or revision
    except OSError:
        return revision
