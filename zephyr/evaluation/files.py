"""How results get on the disk: whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write(path: Path, content: str | bytes) -> None:
    """Under another name beside `path` first, so that nobody ever reads half of it; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.partial")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """As indented JSON. Raises ValueError for numbers that JSON has not."""
    write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def file_name(name: str) -> str:
    """A model's name as part of a file's: owner/model becomes owner_model."""
    return "".join("_" if c in '/\\:*?"<>|\0' else c for c in name).strip(". ") or "model"
