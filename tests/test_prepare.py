"""What the engine of a preparation makes: exact accounts, splits by the prompts' keys, and no near-duplicates."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.prepared import content, read, small
from tests.preparing import MESSAGE, MIXED, SIZES, Shout, dialogue, job
from zephyr.data import sources
from zephyr.errors import UserError
from zephyr.prepare import parts, splits, written
from zephyr.prepare.duplicates import near_duplicates
from zephyr.prepare.engine import run
from zephyr.prepare.work import Split


@small
def test_the_account_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
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


@small
def test_splits_hold_every_row_once_and_no_prompt_on_both_sides(tmp_path: Path):
    rows = [dialogue(n, first=f"prompt {n % 20}") for n in range(60)]
    output = run(job(tmp_path, rows, sizes={"train_sft": None, "test_sft": 10, "train_gen": None, "test_gen": None}))
    train, test = read(output, "train_sft"), read(output, "test_sft")
    key = {n: parts.key(3, f"prompt {n}") for n in range(20)}
    # three rows a prompt: the four prompts of the smallest keys have the first ten rows, and two more
    smallest = sorted(key, key=key.__getitem__)[:4]
    assert [row["messages"] for row in test] == [d["messages"] for n, d in enumerate(rows) if n % 20 in smallest]
    assert [row["messages"] for row in train] == [d["messages"] for n, d in enumerate(rows) if n % 20 not in smallest]


@small
def test_a_generation_row_ends_with_the_users_turn(tmp_path: Path):
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


@small
def test_sizes_that_leave_rows_over_account_for_them(tmp_path: Path):
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
@small
def test_impossible_sizes_are_refused_and_can_be_mended(tmp_path: Path, sizes: Any, words: str):
    with pytest.raises(UserError, match=words):
        run(job(tmp_path, sizes=SIZES | sizes))
    assert not (tmp_path / "out").exists()
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


@small
def test_the_hubs_library_reads_the_output(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    output = run(job(tmp_path))
    loaded = datasets.load_dataset(str(output), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in loaded.items()} == {
        "train_sft": 33, "test_sft": 8, "train_gen": 15, "test_gen": 4,
    }  # fmt: skip
    assert loaded["train_sft"][0]["messages"] == read(output, "train_sft")[0]["messages"]


@small
def test_a_split_is_named_behind_the_folder(tmp_path: Path):
    output = run(job(tmp_path))
    named = "test_gen, test_sft, train_gen, train_sft"
    with pytest.raises(UserError, match=f"no split 'train'. It has: {named}"):
        sources.files(f"{output}:train", "data.train")
    with pytest.raises(UserError, match=f"data.train: the folder {output} has several splits. Name one: "):
        sources.files(str(output), "data.train")


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


@small
def test_the_engine_leaves_near_duplicates_out_and_says_so(tmp_path: Path):
    rows = [dialogue(n, first=f"{'abcdefghij'[n % 10] * 8} {n}") for n in range(25)]
    output = run(job(tmp_path, rows, work=Shout(near=True), similarity=0.9, sizes=SIZES | {"test_sft": 4}))
    said = json.loads((output / "report.json").read_text())
    assert said["dropped"] == {"said_drop": 0, "never_met": 0, "near_duplicate": 15, "beyond_the_splits": 0}
    assert said["rows_out"] == 10
    kept = {row["prompt"] for split in ("train_sft", "test_sft") for row in read(output, split)}
    assert kept == {row["messages"][0]["content"] for row in rows[:10]}
    text = (output / "report.md").read_text()
    assert re.search(r"rows.jsonl line 1[1-9] \| as rows.jsonl line [1-9]: ", text)
