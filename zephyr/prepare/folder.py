"""Where a preparation works: OUTPUT.partial, beside its output, and whose it is.

The folder is valid for one fingerprint: settings, input and code. It holds finished pieces, each written under
a temporary name and renamed, so that a killed run goes on; the output appears by one rename when all of it is there.
"""

import fcntl
import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from errno import ENOLCK, ENOSYS, ENOTSUP
from pathlib import Path
from typing import Any, NamedTuple

import zephyr
from zephyr.errors import UserError

_CODE = [Path(zephyr.__file__).parent / part for part in ("prepare", "data", "errors.py")]


class Input(NamedTuple):
    """A file that is prepared."""

    name: str  # in messages: the file's name, with its folders where another file has the same
    path: Path
    size: int  # bytes
    digest: str  # BLAKE2b of the content, 128 bits


def partial(output: Path) -> Path:
    """The folder of work in progress."""
    return output.with_name(f"{output.name}.partial")


@contextmanager
def durable(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` at the end, when it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Durable JSON."""
    with durable(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def locked(output: Path, shared: bool) -> Iterator[Path]:
    """The folder of work in progress, made if need be, for this process alone or for all that share it. Raises
    UserError when another has it."""
    folder = partial(output)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("ab") as file:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"output: another process is preparing {output}. Wait for it, or give another output."
                ) from error
            except OSError as error:
                if error.errno not in (ENOLCK, ENOTSUP, ENOSYS):  # a file system without locks
                    raise
            if not _same(file.fileno(), folder / "lock"):
                continue  # the other one finished and removed it in between
            yield folder
            return


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def inputs(paths: list[Path], folder: Path) -> list[Input]:
    """The files with their digests, which are kept for as long as size and time of change stay what they are."""
    base = Path(os.path.commonpath([path.parent for path in paths]))
    unique = len({path.name for path in paths}) == len(paths)
    cache = _read(folder / "inputs.json")
    stats = [_stat(path) for path in paths]
    marks = [f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}" for path, stat in zip(paths, stats, strict=True)]
    with ThreadPoolExecutor(4) as threads:
        digests = list(threads.map(lambda path, mark: cache.get(mark) or _digest(path), paths, marks))
    found = dict(zip(marks, digests, strict=True))
    if found != cache:
        write_json(folder / "inputs.json", found)
    names = [path.name if unique else path.relative_to(base).as_posix() for path in paths]
    return [Input(*parts) for parts in zip(names, paths, [stat.st_size for stat in stats], digests, strict=True)]


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise UserError(f"input: {path} cannot be read: {error.strerror}.") from error


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise UserError(f"input: {path} cannot be read: {error.strerror}.") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def fingerprint(settings: Any, work: object) -> str:
    """Of settings (JSON values) and of all code that may have a part in what comes out."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    files = [
        file
        for part in _CODE
        for file in ([part] if part.is_file() else sorted(part.rglob("*")))
        if file.is_file() and file.suffix != ".pyc"
    ]
    for file in (*files, Path(inspect.getfile(type(work)))):
        digest.update(file.name.encode())
        digest.update(hashlib.blake2b(file.read_bytes()).digest())
    return digest.hexdigest()


def settle(folder: Path, mark: str, alone: bool) -> str | None:
    """Make the folder valid for a fingerprint: emptied if it was of another one. Returns what to say of that. Raises
    UserError where it cannot be emptied because others may be at work in it."""
    found = _read(folder / "settings.json").get("fingerprint")
    parts = folder / "parts"
    said = None
    if alone and found != mark:
        said = f"Started afresh: {folder} was made of other input, settings or code." if found else None
        (folder / "settings.json").unlink(missing_ok=True)  # first: parts without it are nobody's
        shutil.rmtree(parts, ignore_errors=True)
    elif found not in (None, mark):
        raise UserError(f"{folder} was begun with other input, settings or code. Remove it, or give another output.")
    if alone:
        for left in folder.rglob(".*.tmp"):  # of a run that was killed
            left.unlink(missing_ok=True)
    parts.mkdir(exist_ok=True)
    if found != mark:
        write_json(folder / "settings.json", {"fingerprint": mark})
    return said


def there(output: Path, mark: str) -> bool:
    """Whether the output is there, of this fingerprint. Raises UserError if something else is."""
    if not output.exists() and not output.is_symlink():
        return False
    if not output.is_dir():
        raise UserError(f"output: {output} is a file. Give a folder that is not there yet.")
    if not any(output.iterdir()):
        return False
    if (found := _read(output / "report.json").get("fingerprint")) == mark:
        return True
    what = "was prepared from other input or with other settings" if found else "holds something else"
    raise UserError(f"output: the folder {output} {what}. Remove it, or give another output.")
