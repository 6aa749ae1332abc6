"""The engine of a preparation: exact accounts, the same bytes however it is run, and nothing lost when it is killed."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.preparing import MESSAGE, MIXED, SIZES, Shout, dialogue, job, lines
from zephyr.data import pool, sources
from zephyr.errors import UserError
from zephyr.prepare import __main__ as command
from zephyr.prepare import engine, parts, report, splits, tally, written
from zephyr.prepare.duplicates import near_duplicates
from zephyr.prepare.engine import make_parts, run
from zephyr.prepare.progress import Shown
from zephyr.prepare.work import Split


def content(output: Path) -> dict[str, Any]:
    """All files of an output, without what tells one run from another."""
    found: dict[str, Any] = {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()}
    account = json.loads(found.pop("report.json"))
    return found | {"report": {key: value for key, value in account.items() if key not in ("run", "fingerprint")}}


def read(output: Path, split: str) -> list[dict[str, Any]]:
    return [columns for _, columns in sources.read(sources.files(f"{output}:{split}", "data.train"))]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows a part."""
    monkeypatch.setattr(parts, "ROWS", 4)


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


def test_the_account_by_hand(tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]):
    output = run(job(tmp_path))
    said = json.loads((output / "report.json").read_text())
    # 45 lines: 41 good, 2 that say drop, one that is no JSON and one whose messages are none
    assert (said["rows_in"], said["bad_rows"]) == (45, 2)
    # a fifth of the 41 is 8; train_sft takes the other 33, of which train_gen is 15
    assert said["splits"] == {"train_sft": 33, "test_sft": 8, "train_gen": 15, "test_gen": 4}
    assert said["dropped"] == {"said_drop": 2, "never_met": 0, "beyond_the_splits": 0}
    assert said["rows_out"] == 41
    # 14 dialogues of 2, 13 of 3 and 13 of 4 messages, and three of 2
    assert said["counts"] == {"messages": 28 + 39 + 52 + 6, "shouted": 1}
    assert said["lengths"]["messages/dialogue"] == {"median": 3, "95 %": 4, "most": 4}
    assert said["settings"] == {
        "volume": 11, "seed": 3, "sizes": SIZES, "bad_rows": "drop", "similarity": None,
    }  # fmt: skip
    assert [file["file"] for file in said["input"]] == ["rows.jsonl"]
    bad = [json.loads(line) for line in (output / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"], row["field"]) for row in bad] == [
        ("rows.jsonl", 43, None),
        ("rows.jsonl", 45, "messages"),
    ]
    assert bad[0]["why"].startswith("invalid JSON (Expecting property name")
    assert "45 rows in, 41 kept" in capsys.readouterr().out
    assert not (tmp_path / "out.partial").exists()


def test_splits_hold_every_row_once_and_no_prompt_on_both_sides(tmp_path: Path, small: None):
    rows = [dialogue(n, first=f"prompt {n % 20}") for n in range(60)]
    output = run(job(tmp_path, rows, sizes={"train_sft": None, "test_sft": 10, "train_gen": None, "test_gen": None}))
    train, test = read(output, "train_sft"), read(output, "test_sft")
    key = {n: parts.key(3, f"prompt {n}") for n in range(20)}
    # three rows a prompt: the four prompts of the smallest keys have the first ten rows, and two more
    smallest = sorted(key, key=key.__getitem__)[:4]
    assert [row["messages"] for row in test] == [d["messages"] for n, d in enumerate(rows) if n % 20 in smallest]
    assert [row["messages"] for row in train] == [d["messages"] for n, d in enumerate(rows) if n % 20 not in smallest]


def test_a_generation_row_ends_with_the_users_turn(tmp_path: Path, small: None):
    rows = [dialogue(n, turns=n + 1) for n in range(1, 8)]
    output = run(job(tmp_path, rows, sizes={"train_sft": None, "test_sft": 1, "train_gen": None, "test_gen": None}))
    whole = [row["messages"] for split in ("train", "test") for row in read(output, f"{split}_sft")]
    short = [row["messages"] for split in ("train", "test") for row in read(output, f"{split}_gen")]
    for before, after in zip(whole, short, strict=True):
        # [u a] -> [u]; [u a u] -> [u]; [u a u a] -> [u a u]
        assert after == before[: (len(before) // 2) * 2 - 1]
        assert after[-1]["role"] == "user"


def test_cutting_where_there_is_no_assistant():
    def turns(roles: str) -> list[dict[str, str]]:
        return [{"role": {"u": "user", "a": "assistant"}[role], "content": f"{n}"} for n, role in enumerate(roles)]

    table = pa.table({"messages": pa.array(list(map(turns, ["u", "", "ua", "a", "uaua", "u"])), pa.list_(MESSAGE))})
    for piece in (table, pa.concat_tables([table.slice(0, 2), table.slice(2)])):
        cut = splits.cut(piece).column("messages").to_pylist()
        assert cut == list(map(turns, ["u", "", "u", "", "uau", "u"]))
    assert splits.cut(table.slice(2, 3)).column("messages").to_pylist() == list(map(turns, ["u", "", "uau"]))
    assert splits.cut(table.slice(0, 0)).num_rows == 0


def test_sizes_that_leave_rows_over_account_for_them(tmp_path: Path, small: None):
    sizes = {"train_sft": 5, "test_sft": 3, "train_gen": 7, "test_gen": 0}
    output = run(job(tmp_path, MIXED[:20], sizes=sizes))
    said = json.loads((output / "report.json").read_text())
    assert said["splits"] == sizes
    assert (said["rows_out"], said["dropped"]["beyond_the_splits"]) == (10, 10)
    with pytest.raises(UserError, match="test_gen-00000-of-00001.parquet is empty"):
        read(output, "test_gen")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"test_sft": 41}, "splits.test_sft=41 leaves nothing to train on: there are 41 rows"),
        ({"test_sft": None, "test_gen": None}, "splits: at least one of test_sft, test_gen needs a size"),
    ],
)
def test_impossible_sizes_are_refused_and_can_be_mended(tmp_path: Path, small: None, sizes: Any, words: str):
    with pytest.raises(UserError, match=words):
        run(job(tmp_path, sizes=SIZES | sizes))
    assert not (tmp_path / "out").exists()
    made = (tmp_path / "out.partial" / "parts").stat().st_mtime_ns
    os.utime(tmp_path / "out.partial" / "parts", ns=(made, made))
    run(job(tmp_path))
    assert (tmp_path / "out" / "data" / "test_sft-00000-of-00001.parquet").exists()


def test_the_key_of_a_rank():
    draw = np.random.default_rng(0)
    keys = draw.integers(0, 2**64, 5000, np.uint64)
    keys[:40] = keys[0]
    keys[40:80] = keys[40] & np.uint64(0xFFFFFFFFFFFF0000)  # equal but for the last 16 bits
    keys[60:80] += np.arange(20, dtype=np.uint64)
    pieces = np.split(keys, [0, 7, 900, 900, 4000])
    ordered = np.sort(keys)
    for rank in (1, 2, 39, 41, 100, 2500, 4999, 5000):
        assert splits.nth(lambda: iter(pieces), rank) == int(ordered[rank - 1])


def test_intervals_by_hand():
    keys = np.array([50, 10, 40, 10, 30, 20], np.uint64)
    known = [Split("train_a", "train"), Split("train_b", "train"), Split("test_a", "test"), Split("test_b", "test")]
    # the third smallest key is 20; of the other three rows, train_b is the first
    found = splits.intervals(
        known, {"train_a": None, "train_b": 1, "test_a": 0.5, "test_b": 1}, lambda: iter([keys]), 6
    )
    assert found == {"train_a": (20, splits.ALL), "train_b": (20, 30), "test_a": (-1, 20), "test_b": (-1, 10)}
    assert splits.inside(keys, (20, 30)).tolist() == [False, False, False, False, True, False]
    assert splits.inside(keys, (-1, 10)).tolist() == [False, True, False, True, False, False]
    assert not splits.inside(keys, (-1, -1)).any()


def test_files_of_a_split_are_of_equal_size_whatever_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(written, "ROWS", 10)
    monkeypatch.setattr(written, "GROUP", 4)
    rows = [dialogue(n) for n in range(40)]
    sizes = {"train_sft": None, "test_sft": 5, "train_gen": 0, "test_gen": 2}
    found = []
    for size in (3, 7, 100):
        monkeypatch.setattr(parts, "ROWS", size)
        output = run(job(tmp_path, rows, sizes=sizes, output=str(tmp_path / f"out{size}")))
        found.append(content(output))
        names = sorted(path.name for path in (output / "data").glob("train_sft*"))
        assert names == [f"train_sft-0000{n}-of-00004.parquet" for n in range(4)]
        files = [pq.ParquetFile(output / "data" / name) for name in names]
        # 35 rows in four files, and in each at most four rows a group
        assert [file.metadata.num_rows for file in files] == [8, 9, 9, 9]
        assert [file.metadata.row_group(0).num_rows for file in files] == [4, 4, 4, 4]
    assert found[0] == found[1] == found[2]


def test_the_hubs_library_reads_the_output(tmp_path: Path, small: None):
    datasets = pytest.importorskip("datasets")
    output = run(job(tmp_path))
    loaded = datasets.load_dataset(str(output), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in loaded.items()} == {
        "train_sft": 33, "test_sft": 8, "train_gen": 15, "test_gen": 4,
    }  # fmt: skip
    assert loaded["train_sft"][0]["messages"] == read(output, "train_sft")[0]["messages"]


def test_a_split_is_named_behind_the_folder(tmp_path: Path, small: None):
    output = run(job(tmp_path))
    named = "test_gen, test_sft, train_gen, train_sft"
    with pytest.raises(UserError, match=f"no split 'train'. It has: {named}"):
        sources.files(f"{output}:train", "data.train")
    with pytest.raises(UserError, match=f"data.train: the folder {output} has several splits. Name one: "):
        sources.files(str(output), "data.train")


# ---------------------------------------------------------------------------------------------------------------------
# Near-duplicates


def near(bands: list[list[int]], signatures: list[list[int]], threshold: float, folder: Path, cut: int = 2) -> list:
    b, s = np.array(bands, np.uint64), np.array(signatures, np.uint32)
    pieces = [(b[:cut], s[:cut]), (b[cut:], s[cut:])]
    return near_duplicates(iter(pieces), len(b), threshold, folder).of.tolist()


def test_near_duplicates_by_hand(tmp_path: Path):
    bands = [[1, 2], [1, 9], [7, 2], [2, 1], [7, 9], [5, 5], [5, 5]]
    signatures = [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1], [3, 3, 3, 3], [3, 3, 3, 4]]
    # 1 shares its first band with 0, and three of four entries; 2 its second, and but two. 3 has 0's bands the other
    # way round, which is none. 4 shares a band with 2 and all entries, one with 1 and three: the earlier is named. 6 and 5 are alike in three.
    assert near(bands, signatures, 0.75, tmp_path / "a") == [-1, 0, -1, -1, 1, -1, 5]
    assert near(bands, signatures, 0.76, tmp_path / "b") == [-1, -1, -1, -1, 2, -1, -1]
    assert near(bands, signatures, 0.5, tmp_path / "c", cut=5) == [-1, 0, 0, -1, 1, -1, 5]


def test_near_duplicates_agree_with_the_rule_read_aloud(tmp_path: Path):
    draw = np.random.default_rng(1)
    bands = draw.integers(0, 30, (300, 4), np.uint64)
    signatures = draw.integers(0, 3, (300, 8)).astype(np.uint32)
    expected = []
    for row in range(300):
        firsts = (next(r for r in range(row + 1) if bands[r, band] == bands[row, band]) for band in range(4))
        alike = [r for r in firsts if r < row and (signatures[r] == signatures[row]).mean() >= 0.5]
        expected.append(min(alike, default=-1))
    assert 30 < sum(of >= 0 for of in expected) < 270
    assert near(bands.tolist(), signatures.tolist(), 0.5, tmp_path / "x", cut=111) == expected


def test_the_engine_leaves_near_duplicates_out_and_says_so(tmp_path: Path, small: None):
    rows = [dialogue(n, first=f"{'abcdefghij'[n % 10] * 8} {n}") for n in range(25)]
    output = run(job(tmp_path, rows, work=Shout(near=True), similarity=0.9, sizes=SIZES | {"test_sft": 4}))
    said = json.loads((output / "report.json").read_text())
    assert said["dropped"] == {"said_drop": 0, "never_met": 0, "near_duplicate": 15, "beyond_the_splits": 0}
    assert said["rows_out"] == 10
    kept = {row["prompt"] for split in ("train_sft", "test_sft") for row in read(output, split)}
    assert kept == {row["messages"][0]["content"] for row in rows[:10]}
    text = (output / "report.md").read_text()
    assert re.search(r"rows.jsonl line 1[1-9] \| as rows.jsonl line [1-9]: ", text)


# ---------------------------------------------------------------------------------------------------------------------
# The same, however it is run


def test_the_number_of_processes_changes_no_byte(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "_POOL_FROM", 1)
    found = []
    for processes in (1, 2, 3):
        found.append(content(run(job(tmp_path, processes=processes, output=str(tmp_path / f"out{processes}")))))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 4 + 2 + 3


def test_how_the_input_is_cut_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [dialogue(n, first=f"{'abcdefghij'[n % 10] * 8} loud {n}") for n in range(60)]
    found = []
    for size, most in ((4, 10**6), (11, 10**6), (100, 700), (100, 10**6)):
        monkeypatch.setattr(parts, "ROWS", size)
        monkeypatch.setattr(parts, "BYTES", most)
        made = job(tmp_path, rows, work=Shout(near=True), similarity=0.9, output=str(tmp_path / f"{size} {most}"))
        found.append(content(run(made)))
    assert found[0] == found[1] == found[2] == found[3]


class Interrupted(BaseException):
    """In place of a kill, at a place that the test names."""


def interrupt(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, calls: int) -> None:
    original, seen = getattr(where, name), []

    def patched(*arguments: Any, **known: Any) -> Any:
        seen.append(1)
        if len(seen) > calls:
            raise Interrupted
        return original(*arguments, **known)

    monkeypatch.setattr(where, name, patched)


PLACES = {
    "the first part": (parts.Maker, "_write", 0),
    "a part's account": (parts, "write_json", 3),
    "the keys": (parts, "_save", 5),
    "the last part": (parts.Maker, "_write", 11),
    "near-duplicates": (engine, "near_duplicates", 0),
    "the sizes": (engine, "intervals", 0),
    "a file": (written.Writer, "_tables", 1),
    "the report": (report, "as_markdown", 0),
    "the account": (engine, "write_json", 0),
    "the rename": (Path, "rename", 0),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_stopped_anywhere_goes_on_to_the_same_bytes(
    place: str, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
):
    rows = [dialogue(n, first=f"{n % 30:03} loud {n}") for n in range(45)]
    known: dict[str, Any] = {"rows": rows, "work": Shout(near=True), "similarity": 1.0}
    whole = content(run(job(tmp_path, **known, output=str(tmp_path / "whole"))))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, *PLACES[place])
        run(job(tmp_path, **known))
    assert not (tmp_path / "out").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial" / "parts").glob("*.parquet")}
    made: Counter[str] = Counter()
    original = parts.Maker.__call__
    monkeypatch.setattr(parts.Maker, "__call__", lambda self, piece: made.update([piece.part]) or original(self, piece))
    assert content(run(job(tmp_path, **known))) == whole
    # 12 parts; what was whole is not made again
    assert len(made) >= 12 - len(before) and (len(made) < 12 or not before)


def test_a_part_that_is_not_whole_is_made_again(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch):
    whole = content(run(job(tmp_path, output=str(tmp_path / "whole"))))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, engine, "intervals", 0)
        run(job(tmp_path))
    folder = tmp_path / "out.partial" / "parts"
    (folder / "00000-000001.parquet").write_bytes(b"half")
    (folder / "00000-000002.json").write_bytes(b'{"rows": ')
    (folder / "00000-000003.parquet").unlink()
    (folder / ".00000-000004.parquet.here-1.tmp").write_bytes(b"left by a kill")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, report, "as_markdown", 0)
        run(job(tmp_path))
    [final] = (tmp_path / "out.partial").glob("final-*")
    (final / "data" / ".train_sft-00000-of-00001.parquet.here-1.tmp").write_bytes(b"left by a kill")
    assert content(run(job(tmp_path))) == whole


KILLED = """
import sys
from pathlib import Path

if __name__ == "__main__":
    from tests import preparing as t
    from zephyr.prepare import engine, folder, parts
    parts.ROWS = 40
    folder._CODE = []  # whoever edits the code meanwhile would start it afresh
    engine.run(t.job(Path(sys.argv[1]), work=t.Shout(seconds=0.001), processes=2))
"""


def start(tmp_path: Path) -> subprocess.Popen[str]:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, script, tmp_path], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def wait_for_parts(tmp_path: Path, process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out.partial" / "parts").glob("*.json"))) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_kill_9_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [dialogue(n, turns=2 + n % 5) for n in range(1200)]
    monkeypatch.setattr(parts, "ROWS", 40)
    job(tmp_path, rows)
    killed = 0
    for _ in range(3):
        process = start(tmp_path)
        wait_for_parts(tmp_path, process, killed + 4)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        killed = len(list((tmp_path / "out.partial" / "parts").glob("*.json")))
        assert killed < 30 and not (tmp_path / "out").exists()
    process = start(tmp_path)
    process.communicate()
    assert process.returncode == 0
    account = json.loads((tmp_path / "out" / "report.json").read_text())
    assert account["rows_in"] == 1200 and account["run"]["rows"] <= 1200 - 40 * killed
    resumed = content(tmp_path / "out")
    whole = content(run(job(tmp_path, output=str(tmp_path / "whole"), work=Shout(seconds=1e-9))))
    assert resumed == whole


def test_machines_that_share_the_folder_give_the_same_bytes(tmp_path: Path, small: None):
    """Four ranks, two at a time, as a cluster would run them; then the one that joins their parts."""
    whole = content(run(job(tmp_path, output=str(tmp_path / "whole"))))
    shared = job(tmp_path)
    with multiprocessing.get_context("fork").Pool(2) as ranks:
        rows = ranks.starmap(make_parts, [(shared, rank, 4) for rank in range(4)])
    assert sum(rows) == 45 and min(rows) > 0
    assert make_parts(shared, 0, 4) == 0
    assert content(run(shared)) == whole
    files = tmp_path / "files"
    files.mkdir()
    for number in range(4):
        (files / f"{number}.jsonl").write_bytes(lines(*MIXED[number * 10 : number * 10 + 10]))
    apart = job(tmp_path, input=str(files), output=str(tmp_path / "apart"))
    assert [make_parts(apart, rank, 2) for rank in range(2)] == [20, 20]
    one = job(tmp_path, input=str(files), output=str(tmp_path / "one"))
    assert content(run(apart)) == content(run(one))


def test_the_same_through_datatrove(tmp_path: Path):
    executor = pytest.importorskip("datatrove.executor")
    files = tmp_path / "files"
    files.mkdir()
    for number in range(9):
        (files / f"{number}.jsonl").write_bytes(lines(*MIXED[number * 5 : number * 5 + 5]))
    whole = content(run(job(tmp_path, input=str(files), output=str(tmp_path / "whole"))))
    shared = job(tmp_path, input=str(files))

    def share(data: Any, rank: int = 0, world_size: int = 1) -> Any:
        make_parts(shared, rank, world_size)
        return data

    logs = str(tmp_path / "logs")
    executor.LocalPipelineExecutor(pipeline=[share], tasks=4, workers=2, logging_dir=logs).run()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial" / "parts").glob("*.json")}
    assert len(before) == 9
    assert make_parts(shared) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert content(run(shared)) == whole


def magnitude():
    return abs


def test_little_is_in_flight():
    ahead = []
    taken = iter(range(40))

    def items():
        for item in taken:
            ahead.append(item)
            yield item

    results = pool.ordered(magnitude, items(), 2, "lost")
    for count, result in enumerate(islice(results, 20), 1):
        assert result == count - 1
        assert len(ahead) <= count + 4
    results.close()
    assert len(ahead) < 30


# ---------------------------------------------------------------------------------------------------------------------
# Whose folder it is


def test_what_is_there_already_is_left(tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]):
    run(job(tmp_path))
    before = (tmp_path / "out" / "report.json").stat().st_mtime_ns
    run(job(tmp_path))
    assert "out is already there" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.json").stat().st_mtime_ns == before
    for other in ({"seed": 4}, {"settings": {"volume": 12}}, {"sizes": SIZES | {"test_gen": 1}}, {"bad_rows": "error"}):
        with pytest.raises(UserError, match="out was prepared from other input or with other settings. Remove it, or"):
            run(job(tmp_path, **other))
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(lines(dialogue(99)))
    with pytest.raises(UserError, match="from other input"):
        run(job(tmp_path))
    assert not (tmp_path / "out.partial").exists()


def test_nothing_of_others_is_touched(tmp_path: Path, small: None):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="output: the folder .*out holds something else. Remove it, or give another"):
        run(job(tmp_path))
    with pytest.raises(UserError, match="output: .*thesis.tex is a file. Give a folder"):
        run(job(tmp_path, output=str(tmp_path / "out" / "thesis.tex")))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    (tmp_path / "out" / "thesis.tex").unlink()
    run(job(tmp_path))  # an empty folder is nothing to lose


def test_an_output_in_the_input_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="output: .*out lies in the input, .* and would become a part of it"):
        run(job(tmp_path, input=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_other_settings_start_afresh(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    whole = content(run(job(tmp_path, seed=4, output=str(tmp_path / "whole"))))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, parts, "write_json", 3)
        run(job(tmp_path))
    with pytest.raises(UserError, match="was begun with other input, settings or code. Remove it"):
        make_parts(job(tmp_path, seed=4))  # others may be at work in it
    assert content(run(job(tmp_path, seed=4))) == whole
    assert "Started afresh: " in capsys.readouterr().out


def test_sizes_can_change_without_starting_afresh(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, report, "as_markdown", 0)
        run(job(tmp_path))
    monkeypatch.setattr(parts.Maker, "__call__", lambda *_: pytest.fail("made again"))
    output = run(job(tmp_path, sizes=SIZES | {"test_gen": 2}))
    assert len(read(output, "test_gen")) == 2


def test_one_run_at_a_time(tmp_path: Path):
    job(tmp_path, [dialogue(n) for n in range(4000)])
    process = start(tmp_path)
    wait_for_parts(tmp_path, process, 1)
    with pytest.raises(UserError, match="another process is preparing .*out. Wait for it, or give another output"):
        run(job(tmp_path))
    process.send_signal(signal.SIGINT)
    process.communicate()


def test_a_killed_worker_is_said(tmp_path: Path, small: None):
    with pytest.raises(UserError, match="A process that prepares the data was killed"):
        run(job(tmp_path, work=Shout(die_at="question 30"), processes=2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_bad_row_is_an_error(processes: int, tmp_path: Path, small: None):
    with pytest.raises(UserError, match=r"^rows.jsonl line 43: invalid JSON .* Mend the row, or set bad_rows=drop"):
        run(job(tmp_path, bad_rows="error", processes=processes))
    assert not (tmp_path / "out").exists()
    run(job(tmp_path))  # goes on
    assert (tmp_path / "out").exists()


def test_a_defect_of_the_work_names_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Shout, "__call__", lambda self, row: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        run(job(tmp_path))
    assert error.value.__notes__ == ["at rows.jsonl line 1"]


# ---------------------------------------------------------------------------------------------------------------------
# The report, the progress, the command


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "a.jsonl line 7: messages[2].role is 'x' where 'user' is due; join turns.",
            ("a.jsonl", 7, "messages[2].role"),
        ),
        ("b c.parquet row 12: data is null, not a list.", ("b c.parquet", 12, "data")),
        ("d/a.jsonl line 1: invalid JSON (x at column 2). Mend it.", ("d/a.jsonl", 1, None)),
        ("a.jsonl line 3: a row must be a JSON object, not list.", ("a.jsonl", 3, None)),
        ("a.jsonl line 3: completions[1].response is not a text.", ("a.jsonl", 3, "completions[1].response")),
        ("something else", (None, None, None)),
    ],
)
def test_a_bad_row_by_its_message(message: str, expected: tuple[Any, ...]):
    row = report.bad_row(message)
    assert (row["file"], row.get("line", row.get("row")), row["field"]) == expected
    assert row["why"] and row["mend"].endswith(".")


def test_examples_do_not_depend_on_the_cut():
    places = [f"line {n}" for n in range(100)]
    for size in (1, 7, 100):
        merged = tally.Examples()
        for first in range(0, 100, size):
            some = tally.Examples()
            for place in places[first : first + size]:
                some.add("kind", place, [place])
                some.add("kind", place, ["a second of one place"])
            merged.update(json.loads(json.dumps(some.as_json())))
        found = [where for _, where, _ in merged.as_json()["kind"]]
        assert found == sorted(places, key=lambda place: zlib.crc32(place.encode()))[: tally.EXAMPLES]


def test_lengths_are_counted_in_classes():
    assert [tally.edge(n) for n in (0, 1, 9, 15, 16)] == [0, 1, 9, 15, 16]
    assert all(0.91 < tally.edge(n) / n <= 1 for n in range(16, 5000))
    assert tally.quantile(Counter({1: 50, 2: 45, 9: 5}), 0.5) == 1
    assert tally.quantile(Counter({1: 50, 2: 44, 9: 6}), 0.95) == 9


def test_the_report_cannot_be_broken_by_a_text(tmp_path: Path, small: None):
    rows = [dialogue(n, first=f"loud | <b>`x\n\n# {n}") for n in range(6)]
    text = (run(job(tmp_path, rows, sizes=SIZES | {"test_sft": 1, "test_gen": 1})) / "report.md").read_text()
    assert r"| loud \| \<b\>\`x \# 0 |".replace(r"\>", ">") in text
    assert not any(line.startswith("# ") for line in text.splitlines()[1:])


def test_plain_lines_of_progress(capsys: pytest.CaptureFixture[str]):
    with Shown(1000, seconds=0.0) as shown:
        shown.skipped(500)
        time.sleep(0.05)
        shown.advance(30, 600)
    line = capsys.readouterr().err
    assert re.fullmatch(r"60%  30 rows  [\d,]+ rows/s  ETA 0:00:00\n", line), line


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "Error: Which data?"),
        (["ultrachatt"], 2, "Error: Unknown command 'ultrachatt'."),
        (["--help"], 0, "Usage: python -m zephyr.prepare COMMAND key=value"),
    ],
)
def test_the_commands_are_listed(arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]):
    assert command.main(arguments) == status
    said = capsys.readouterr()
    text = said.err if status else said.out
    assert words in text and all(name in text for name in command.COMMANDS)


STOPPED = """
import sys
from pathlib import Path

if __name__ == "__main__":
    from tests import preparing as t
    from zephyr.command import status
    from zephyr.prepare import engine, parts
    parts.ROWS = 40
    job = t.job(Path(sys.argv[1]), work=t.Shout(seconds=0.001), processes=2)
    sys.exit(status(lambda: engine.run(job) and None))
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_in_order(signum: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "KILLED", STOPPED)
    job(tmp_path, [dialogue(n) for n in range(4000)])
    process = start(tmp_path)
    wait_for_parts(tmp_path, process, 2)
    process.send_signal(signum)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert error.splitlines() == [f"Stopped by {signum.name}. The same command goes on."]
    assert not list((tmp_path / "out.partial" / "parts").glob(".*.tmp"))
