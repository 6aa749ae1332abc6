"""What can be wrong with data: each answered by one message that says what, where, and how to mend it, with status 2,
and nothing under the output's name. Where single rows are wrong, bad_rows=drop leaves them out and names every one."""

import errno
import gzip
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zephyr.data import sources
from zephyr.prepare import __main__ as command
from zephyr.prepare import engine

ROOT = Path(__file__).parents[1]
ANSWER = "The tide comes in twice a day, and it goes out again just as often."


def good(number: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"How often does the tide number {number} come in at the old harbour?"},
            {"role": "assistant", "content": ANSWER},
        ]
    }


def line(row: Any) -> bytes:
    return json.dumps(row).encode()


def said(*changes: Any, **message: Any) -> bytes:
    """A row whose second message is another one."""
    return line({"messages": [good(0)["messages"][0], *(changes or [{"role": "assistant", **message}])]})


GOOD = [line(good(number)) for number in range(12)]


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its Ctrl-C


@pytest.fixture
def short_lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A line may have ten thousand bytes, to try with a small file what 64 MiB are for a large one."""
    monkeypatch.setattr(sources, "_LINE_BYTES", 10_000)
    yield


def prepare(tmp_path: Path, source: Path | str, *overrides: str) -> int:
    output = [] if any(override.startswith("output=") for override in overrides) else [f"output={tmp_path / 'out'}"]
    quick = ["truecase=null", "near_duplicates=null", "processes=1", "splits.test_sft=2", "bad_rows=error"]
    return command.main(["ultrachat", f'input="{source}"', *output, *quick, *overrides])


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], *arguments: Any) -> None:
    assert prepare(tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and error.count("\n") == 1 and "Traceback" not in error, error
    for word in words:
        assert word in error
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Of a row. The message names file and line, in either mode.

AGAIN = "Write it again with a JSON library."
KEYS = "must have the keys role and content"
ROWS: dict[str, tuple[bytes, list[str]]] = {
    "a word": (b"{not json", ["invalid JSON (Expecting property name", AGAIN]),
    "cut": (GOOD[0][:60], ["invalid JSON (Invalid control character", AGAIN]),
    "two on a line": (GOOD[0] + GOOD[1], ["invalid JSON (Extra data at column 213)", AGAIN]),
    "Python's quotes": (str(good(0)).encode(), ["invalid JSON (Expecting property name enclosed in double quotes"]),
    "a comma too many": (GOOD[0][:-1] + b",}", ["invalid JSON (", "at column"]),
    "a comment": (b"// the next one is better", ["invalid JSON (Expecting value at column 1)"]),
    "a raw tab": (GOOD[0].replace(b"tide", b"ti\tde"), ["invalid JSON (Invalid control character at"]),
    "a web page": (b"<!DOCTYPE html><title>404</title>", ["invalid JSON (Expecting value at column 1)"]),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1", ["invalid JSON (Expecting value"]),
    "CSV": (b'"user","How often?"', ["invalid JSON (Extra data at column 7)"]),
    "a list": (b'["user", "assistant"]', ["a row must be a JSON object, not list. Give it columns."]),
    "a number": (b"42", ["a row must be a JSON object, not int"]),
    "a text": (b'"hello"', ["a row must be a JSON object, not str"]),
    "null": (b"null", ["a row must be a JSON object, not NoneType"]),
    "NaN": (b"NaN", ["a row must be a JSON object, not float"]),
    "a number of 5,000 digits": (b'{"messages": ' + b"1" * 5000 + b"}", ["JSON beyond what Python reads"]),
    "deep nesting": (b'{"messages": ' + b"[" * 9000, ["beyond what Python reads (maximum recursion depth exceeded"]),
    "Latin-1": (GOOD[0].replace(b"tide", b"mar\xe9e"), ["not UTF-8 (byte 0xE9 at ", "Re-save it as UTF-8."]),
    "half a UTF-8 letter": (GOOD[0].replace(b"tide", b"mar\xc3"), ["not UTF-8 (byte 0xC3 at "]),
    "NUL bytes": (GOOD[0].replace(b"tide", b"ti\0de"), ["holds NUL bytes, as after a crash", "Re-save it as UTF-8."]),
    "nothing but NUL bytes": (b"\0" * 4096, ["holds NUL bytes, as after a crash"]),
    "too long a line": (said(content="x" * 20_000), ["has 20,146 bytes, above 10,000. Write one JSON object a line."]),
    "a key twice": (b'{"messages": [], ' + GOOD[0][1:], ["has the key 'messages' twice. Keep one of them."]),
    "a message's key twice": (
        GOOD[0].replace(b'"role": "user"', b'"role": "user", "role": "system"'),
        ["has the key 'role' twice"],
    ),
    "a lone surrogate": (said(content="\ud800 a"), ["messages[1].content holds half a character (a lone surrogate) at 0"]),
    "no columns": (b"{}", ["needs the column messages", "found none"]),
    "other columns": (line({"text": "How often?"}), ["needs the column messages", "found text"]),
    "messages null": (line({"messages": None}), ["messages is null, not a list"]),
    "messages a text": (line({"messages": "hello"}), ["messages is str, not a list"]),
    "messages an object": (line({"messages": {"role": "user"}}), ["messages is dict, not a list"]),
    "no message": (line({"messages": []}), ["messages is empty"]),
    "a message that is a text": (said("hello"), [f"messages[1] {KEYS}"]),
    "a message that is null": (said(None), [f"messages[1] {KEYS}"]),
    "no content": (said(text="hello"), [f"messages[1] {KEYS}"]),
    "no role": (said({"content": "hello"}), [f"messages[1] {KEYS}"]),
    "content null": (said(content=None), ["messages[1].content is null, not a text"]),
    "content a number": (said(content=12), ["messages[1].content is int, not a text"]),
    "content of parts": (said(content=[{"type": "text"}]), ["messages[1].content is list, not a text"]),
    "an unknown role": (said({"role": "gpt", "content": "x"}), ["messages[1].role='gpt' is not one of system, user,"]),
    "a role that is a list": (said({"role": ["user"], "content": "x"}), ["messages[1].role=['user'] is not one of"]),
    "data a text": (line({"data": "hello"}), ["data is str, not a list"]),
    "data with null": (line({"data": ["hello", None]}), ["data[1].content is null, not a text"]),
    "data with a number as the text": (line({"data": ["hello", 3]}), ["data[1].content is int, not a text"]),
}  # fmt: skip


def test_without_a_mistake_it_works(tmp_path: Path, short_lines: None):
    """And a byte-order mark, Windows' line ends, blank lines and a missing last line end are none."""
    content = b"\xef\xbb\xbf" + b"\r\n".join([*GOOD[:6], b"", b"  ", *GOOD[6:]])
    (tmp_path / "a.jsonl").write_bytes(content)
    assert prepare(tmp_path, tmp_path / "a.jsonl") == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rows_out"] == 12


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_row_is_an_error(name: str, tmp_path: Path, short_lines: None, capsys: pytest.CaptureFixture[str]):
    row, words = ROWS[name]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*GOOD[:7], row, b"{another", *GOOD[7:]]))
    advice = "Mend the row, or set bad_rows=drop to leave such rows out."
    refused(tmp_path, capsys, ["Error: a.jsonl line 8: ", *words, advice], tmp_path / "a.jsonl")


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_wrong_rows_are_left_out_and_all_named(zipped: bool, tmp_path: Path, short_lines: None):
    wrong = [row for row, _ in ROWS.values()]
    content = b"\n".join([*GOOD[:6], *wrong, *GOOD[6:]]) + b"\n"
    path = tmp_path / ("a.jsonl.gz" if zipped else "a.jsonl")
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert prepare(tmp_path, path, "bad_rows=drop") == 0
    account = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (account["rows_in"], account["rows_out"], account["bad_rows"]) == (12 + len(wrong), 12, len(wrong))
    named = [json.loads(text) for text in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["line"] for row in named] == list(range(7, 7 + len(wrong)))
    for row, (name, (_, words)) in zip(named, ROWS.items(), strict=True):
        assert row["file"] == path.name and row["mend"].endswith("."), name
        assert words[0].split(". ")[0].rstrip(".") in f"{row['why']}. {row['mend']}", name
    fields = {name: row["field"] for name, row in zip(ROWS, named, strict=True)}
    assert fields["content null"] == "messages[1].content"
    assert fields["data a text"] == "data"
    assert fields["an unknown role"] == "messages[1].role"
    assert fields["a word"] is None


# ---------------------------------------------------------------------------------------------------------------------
# Of a file. Each makes it, and returns the input.

PLAIN = b"\n".join(GOOD) + b"\n"
Make = Callable[[Path], Path]


def file(name: str, content: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


def damaged(content: bytes, at: float) -> bytes:
    """Forty bytes of noise in it."""
    place = round(at * len(content))
    return content[:place] + bytes(range(200, 240)) + content[place + 40 :]


def several(**files: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / "in").mkdir()
        for name, content in files.items():
            (folder / "in" / name.replace("_", ".")).write_bytes(content)
        return folder / "in"

    return make


def empty_folder(folder: Path) -> Path:
    (folder / "a.jsonl").mkdir()
    return folder / "a.jsonl"


def dangling(folder: Path) -> Path:
    (folder / "a.jsonl").symlink_to(folder / "gone.jsonl")
    return folder / "a.jsonl"


def loop(folder: Path) -> Path:
    (folder / "in").mkdir()
    (folder / "in" / "a.jsonl").symlink_to(folder / "in" / "a.jsonl")
    return folder / "in"


def published(folder: Path) -> Path:
    for split in ("train_sft", "test_sft"):
        (folder / f"{split}-00000-of-00001.parquet").write_bytes(parquet([good(0)]))
    return folder


# texts that do not repeat, of 60 KB when packed
NOISE = [{**good(n), "id": os.urandom(60).hex()} for n in range(1000)]
NOISY = b"".join(line(row) + b"\n" for row in NOISE)
BAD_UTF8 = pa.Array.from_buffers(
    pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xc3\x28")]
)  # fmt: skip


def not_utf8() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": BAD_UTF8, "messages": [good(0)["messages"]]}), sink)
    return sink.getvalue()


FILES: dict[str, tuple[Make, list[str]]] = {
    "missing": (lambda folder: folder / "gone.jsonl", ["input: ", "does not exist (looked in", "Give a file, a folder"]),
    "another suffix": (file("a.csv", PLAIN), ["input: ", "a.csv is none of .jsonl, "]),
    "empty": (file("a.jsonl", b""), ["a.jsonl is empty: it holds no row"]),
    "blank lines": (file("a.jsonl", b"\n \r\n\n"), ["a.jsonl is empty: it holds no row"]),
    "empty gzip": (file("a.jsonl.gz", gzip.compress(b"")), ["a.jsonl.gz is empty: it holds no row"]),
    "gzip of no bytes": (file("a.jsonl.gz", b""), ["a.jsonl.gz is empty: it holds no row"]),
    "cut gzip": (file("a.jsonl.gz", gzip.compress(NOISY)[:-5000]), ["a.jsonl.gz is not a complete gzip file", "again"]),
    "damaged gzip": (file("a.jsonl.gz", damaged(gzip.compress(NOISY), 0.5)), ["is not a complete gzip file"]),
    "gzip with a wrong sum": (
        file("a.jsonl.gz", gzip.compress(PLAIN)[:-8] + b"\0" * 8),
        ["is not a complete gzip file: CRC check failed"],
    ),
    "no gzip": (file("a.jsonl.gz", PLAIN), ["a.jsonl.gz is not a complete gzip file: Not a gzipped file"]),
    "gzip by another name": (file("a.jsonl", gzip.compress(PLAIN)), ["a.jsonl line 1: not UTF-8 (byte 0x8B at 1)"]),
    "UTF-16": (file("a.jsonl", PLAIN.decode().encode("utf-16")), ["a.jsonl line 1: not UTF-8 (byte 0xFF at 0)"]),
    "UTF-16 without a mark": (file("a.jsonl", PLAIN.decode().encode("utf-16-le")), ["line 1: holds NUL bytes"]),
    "JSON that is no list": (file("a.json", GOOD[0]), ["a.json must hold a JSON list", "name it .jsonl"]),
    "JSON lines in a .json": (file("a.json", PLAIN), ["a.json: invalid JSON (Extra data"]),
    "cut JSON": (file("a.json", line([good(0)])[:-9]), ["a.json: invalid JSON ("]),
    "a list of texts": (file("a.json", b'["x"]'), ["a.json row 1: a row must be a JSON object, not str"]),
    "empty list": (file("a.json", b"[]"), ["a.json is empty: it holds no row"]),
    "no Parquet": (file("a.parquet", PLAIN), ["a.parquet is not a readable Parquet file", "Download or write it again"]),
    "Parquet of no bytes": (file("a.parquet", b""), ["a.parquet is not a readable Parquet file"]),
    "cut Parquet": (file("a.parquet", parquet(NOISE)[:-3000]), ["a.parquet is not a readable Parquet file"]),
    "Parquet with damaged pages": (
        file("a.parquet", damaged(parquet(NOISE, compression="zstd", write_page_checksum=True), 0.5)),
        ["a.parquet is not a readable Parquet file"],
    ),
    "Parquet by another name": (file("a.jsonl", parquet(NOISE)), ["a.jsonl line 1: "]),
    "Parquet of other columns": (
        file("a.parquet", parquet([{"chosen": "a", "rejected": "b"}])),
        ["a.parquet row 1: ", "needs the column messages", "found chosen, rejected"],
    ),
    "Parquet with texts that are not UTF-8": (file("a.parquet", not_utf8()), ["a.parquet row 1: holds a value that"]),
    "mixed kinds of files": (
        several(a_jsonl=PLAIN, b_jsonl=line({"prompt": "x", "chosen": "a", "rejected": "b"})),
        ["b.jsonl line 1: ", "needs the column messages", "found chosen, prompt, rejected"],
    ),
    "the second file is damaged": (
        several(a_jsonl=PLAIN, b_jsonl_gz=gzip.compress(NOISY)[:-100]),
        ["in/b.jsonl.gz is not a complete gzip file"],
    ),
    "an empty folder": (empty_folder, ["input: the folder ", "a.jsonl holds no .jsonl"]),
    "a folder of other files": (several(notes_txt=b"x"), ["in holds no .jsonl"]),
    "a link to nothing": (dangling, ["input: ", "does not exist"]),
    "a link to itself": (loop, ["in holds no .jsonl"]),
    "several splits": (published, ["has several splits. Name one: ", "test_sft, train_sft"]),
    "not on the hub": (lambda folder: Path("some/set"), ["no reachable hub data set 'some/set'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_an_error(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make, words = FILES[name]
    refused(tmp_path, capsys, words, make(tmp_path), f"bad_rows={'error' if ' 1: ' in words[0] else 'drop'}")


def test_parquet_without_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pq.write_table(pa.Table.from_pylist([good(0)]).slice(0, 0), tmp_path / "a.parquet")
    refused(tmp_path, capsys, ["a.parquet is empty: it holds no row"], tmp_path / "a.parquet")


def test_a_split_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["input: the folder ", "has no split 'train'. It has: test_sft, train_sft."]
    refused(tmp_path, capsys, words, f"{published(tmp_path)}:train")


def test_no_row_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.jsonl").write_bytes(b"{\n[]\n" + line({"messages": good(0)["messages"][:1]}))
    words = ["none of the 3 rows is left: 1 alternation, 2 unusable, the first: a.jsonl line 1: invalid JSON"]
    refused(tmp_path, capsys, words, tmp_path / "a.jsonl", "bad_rows=drop")


# ---------------------------------------------------------------------------------------------------------------------
# Of the machine


def opening(problem: int) -> Callable[..., Any]:
    original = Path.open

    def patched(path: Path, *arguments: Any, **known: Any) -> Any:
        if path.name == "a.jsonl":
            raise OSError(problem, os.strerror(problem), str(path))
        return original(path, *arguments, **known)

    return patched


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (errno.EACCES, "a.jsonl cannot be read: Permission denied."),
        (errno.EIO, "a.jsonl cannot be read: Input/output error."),
        (errno.ENOENT, "a.jsonl cannot be read: No such file or directory."),
    ],
)
def test_a_file_that_cannot_be_read(
    problem: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.jsonl").write_bytes(PLAIN)
    monkeypatch.setattr(Path, "open", opening(problem))  # as root, every file can be read
    refused(tmp_path, capsys, [words], tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("a.jsonl", ["output: ", "a.jsonl is a file. Give a folder that is not there yet."]),
        ("full", ["output: the folder ", "full holds something else. Remove it, or give another output."]),
        ("a.jsonl/out", ["output: cannot write ", "Not a directory. Mend that, or give another output"]),
        ("x" * 300, ["output: cannot write ", "File name too long"]),
    ],
)
def test_an_output_that_cannot_be(output: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.jsonl").write_bytes(PLAIN)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refused(tmp_path, capsys, words, tmp_path / "a.jsonl", f"output={tmp_path / output}")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "a.jsonl").read_bytes() == PLAIN
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "full"]


@pytest.mark.parametrize(("problem", "words"), [(errno.EROFS, "Read-only file system"), (errno.EACCES, "Permission")])
def test_an_output_that_must_not_be_written(
    problem: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.jsonl").write_bytes(PLAIN)

    def mkdir(path: Path, *arguments: Any, **known: Any) -> None:
        raise OSError(problem, os.strerror(problem), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    refused(tmp_path, capsys, ["output: cannot write ", words], tmp_path / "a.jsonl")


FULL = """
import resource, sys
from zephyr.prepare import __main__ as command, parts

if __name__ == "__main__":
    parts.ROWS = 300
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
    sys.exit(command.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("size", "processes"), [(9_000, 2), (60_000, 1)], ids=["a part", "a split"])
def test_a_full_disk_is_said_and_gone_on_from(size: int, processes: int, tmp_path: Path):
    """No file may be larger than this: so it ends at a part, or, where those are small enough, at a split's file."""
    (tmp_path / "a.jsonl").write_bytes(NOISY.replace(b'"id"', b'"prompt_id"'))
    rows = [{"messages": [{**m, "content": m["content"] + row["id"]} for m in row["messages"]]} for row in NOISE]
    (tmp_path / "a.jsonl").write_bytes(b"".join(line(row) + b"\n" for row in rows))
    (tmp_path / "full.py").write_text(FULL)
    overrides = ["ultrachat", f"input={tmp_path / 'a.jsonl'}", f"output={tmp_path / 'out'}", f"processes={processes}",
                 "truecase=null", "near_duplicates=null"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(limit: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, tmp_path / "full.py", str(limit), *overrides], env=environment,
                              capture_output=True, text=True, timeout=120)  # fmt: skip

    done = start(size)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "output: cannot write " in done.stderr
    assert "File too large. Free some space; the same command goes on." in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").rglob("*.tmp"))
    assert start(10**9).returncode == 0
    assert (tmp_path / "out" / "report.md").exists()


def test_the_machines_words_are_known():
    """A full disk and a quota are among them."""
    assert {errno.ENOSPC, errno.EDQUOT} <= engine._DISK


def test_there_are_sixty():
    assert len(ROWS) + len(FILES) + 3 + 3 + 4 + 2 + 2 >= 60
