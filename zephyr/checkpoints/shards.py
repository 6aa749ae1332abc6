"""The big tensors of a checkpoint on disk: each process writes the rows that it holds and reads those that it needs.

    shard-00000.safetensors   one file of each process that has something to write. A tensor is named by its path in
                              the tree that was saved. The header says at which row of the whole tensor a piece of it
                              starts ("rows"), and which names are of the same memory, written once ("ties").

In the tree that remains, a tensor of the whole shape without data (on torch's meta device) keeps the place of each.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from zephyr import distributed
from zephyr.errors import UserError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint that is still on disk, in one file or in several."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    pieces: list[tuple[int, Any, str]]  # its first row, an open file, its name there

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` in memory of their own; only these bytes are read."""
        found = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
        missing = found.numel()
        for first, file, name in self.pieces:
            piece = file.get_slice(name)
            begin, end = max(start, first), min(stop, first + piece.get_shape()[0])
            if begin < end:
                found[begin - start : end - start] = piece[begin - first : end - first]
                missing -= found[begin - start : end - start].numel()
        if missing:
            raise UserError(f"The checkpoint lacks rows {start} to {stop} of {self.name}. Resume from another one.")
        return found

    def whole(self) -> Tensor:
        """All rows."""
        return self.rows(0, self.shape[0])

    @torch.no_grad()
    def into(self, target: Tensor) -> None:
        """Fill a tensor of the same shape; a sharded one with the rows that this process holds.

        Raises UserError if the shapes differ.
        """
        if target.shape != self.shape:
            shapes = f"{list(self.shape)} in the checkpoint and {list(target.shape)} here"
            raise UserError(f"{self.name} is of the shape {shapes}: they are of different models.")
        local, start = _held(target)
        local.copy_(self.rows(start, start + len(local)))


def change(tree: Any, leaf: Callable[[str, Any], Any], path: str = "") -> Any:
    """A copy of nested dicts, lists and tuples with `leaf(path, value)` for each value in them."""
    if isinstance(tree, dict):
        return {key: change(value, leaf, f"{path}/{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(change(value, leaf, f"{path}/{index}") for index, value in enumerate(tree))
    return leaf(path, tree)


def split(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """The tree with placeholders, and by their paths the tensors whose places these keep: all but single numbers."""
    tensors: dict[str, Tensor] = {}

    def leaf(path: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        tensors[path] = value
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    return change(tree, leaf), tensors


def join(tree: Any, files: Iterable[Path]) -> Any:
    """The tree with a Stored in place of each placeholder, to be read from the shards `files`."""
    pieces: dict[str, list[tuple[int, Any, str]]] = defaultdict(list)
    for path in files:
        file: Any = safe_open(path, "pt")
        notes = {key: json.loads(value) for key, value in file.metadata().items()}
        for name, kept in [*((name, name) for name in file.keys()), *notes["ties"].items()]:  # noqa: SIM118
            pieces[name].append((notes["rows"].get(kept, 0), file, kept))

    def leaf(path: str, value: Any) -> Any:
        placeholder = isinstance(value, Tensor) and value.is_meta
        return Stored(path, value.shape, value.dtype, pieces[path]) if placeholder else value

    return change(tree, leaf)


def write(tensors: dict[str, Tensor], file: Path) -> dict[str, Any] | None:
    """Write this process's pieces, one tensor at a time; returns what `put` does, None if it has no piece to write.

    Of a tensor sharded by rows, those are its rows, in the first of several copies; of any other it is all on rank 0.
    Raises OSError if the disk is full, TypeError for a tensor sharded in another way.
    """
    pieces: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    ties: dict[str, str] = {}
    names: dict[Any, str] = {}
    for name, tensor in tensors.items():
        local, start = _held(tensor.detach())
        if not _writes(tensor) or local.numel() == 0:
            continue
        if local.dtype not in _DTYPES:
            raise TypeError(f"{name} is of {local.dtype}, which safetensors files do not hold")
        view = (local.device, local.data_ptr(), local.dtype, local.shape, local.stride())
        kept = names.setdefault(view, name)
        if kept != name:
            ties[name] = kept
        else:
            pieces[name] = local
            if start > 0:
                rows[name] = start
    if not pieces:
        return None

    ordered = sorted(pieces, key=lambda name: -pieces[name].element_size())  # then all are aligned in the file
    header: dict[str, Any] = {"__metadata__": {"rows": json.dumps(rows), "ties": json.dumps(ties)}}
    end = 0
    for name in ordered:
        piece = pieces[name]
        begin, end = end, end + piece.numel() * piece.element_size()
        header[name] = {"dtype": _DTYPES[piece.dtype], "shape": list(piece.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def content() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little") + text
        for name in ordered:
            yield pieces[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy()

    return put(file, content())


def put(file: Path, chunks: Iterable[Any]) -> dict[str, Any]:
    """Write bytes to a new file and on to the disk. Returns their number and their BLAKE2b digest, taken beforehand."""
    digest = hashlib.blake2b(digest_size=32)
    with file.open("xb") as stream, ThreadPoolExecutor(1) as aside:
        for chunk in chunks:
            hashing = aside.submit(digest.update, chunk)
            stream.write(chunk)
            hashing.result()
        stream.flush()
        os.fsync(stream.fileno())
        return {"size": stream.tell(), "blake2b": digest.hexdigest()}


def fault(file: Path, written: dict[str, Any]) -> str | None:
    """How a file differs from what `put` returned of it, if it does."""
    try:
        if (size := file.stat().st_size) != written["size"]:
            return f"has {size} bytes, {written['size']} were written"
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest == written["blake2b"] else "is not what was written: its checksum differs"


def _held(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of a tensor that this process holds, and the number of the first."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    if any(placement not in (Shard(0), Replicate()) for placement in tensor.placements):
        raise TypeError(f"only rows are shared out among processes, not {tensor.placements}")
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), offset[0]


def _writes(tensor: Tensor) -> bool:
    """Whether this process writes what it holds, of all that hold the same."""
    if not isinstance(tensor, DTensor):
        return distributed.rank() == 0
    at = zip(tensor.device_mesh.get_coordinate() or (), tensor.placements, strict=True)
    return all(coordinate == 0 for coordinate, placement in at if placement.is_replicate())
