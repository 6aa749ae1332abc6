"""A preparation gives the same bytes however it is cut, shared out, stopped or killed, and repeats nothing whole."""

import json
import multiprocessing
import os
import signal
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.prepared import content, interrupted, small, start, wait_for_parts
from tests.preparing import MIXED, Shout, dialogue, job, lines
from zephyr.data import pool
from zephyr.prepare import engine, parts, report, written
from zephyr.prepare.engine import make_parts, run


@small
def test_the_number_of_processes_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
@small
def test_a_run_stopped_anywhere_goes_on_to_the_same_bytes(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [dialogue(n, first=f"{n % 30:03} loud {n}") for n in range(45)]
    known: dict[str, Any] = {"rows": rows, "work": Shout(near=True), "similarity": 1.0}
    whole = content(run(job(tmp_path, **known, output=str(tmp_path / "whole"))))
    with interrupted(*PLACES[place]):
        run(job(tmp_path, **known))
    assert not (tmp_path / "out").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial" / "parts").glob("*.parquet")}
    made: Counter[str] = Counter()
    original = parts.Maker.__call__
    monkeypatch.setattr(parts.Maker, "__call__", lambda self, piece: made.update([piece.part]) or original(self, piece))
    assert content(run(job(tmp_path, **known))) == whole
    # 12 parts; what was whole is not made again
    assert len(made) >= 12 - len(before) and (len(made) < 12 or not before)


@small
def test_a_part_that_is_not_whole_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = content(run(job(tmp_path, output=str(tmp_path / "whole"))))
    with interrupted(engine, "intervals", 0):
        run(job(tmp_path))
    folder = tmp_path / "out.partial" / "parts"
    (folder / "00000-000001.parquet").write_bytes(b"half")
    (folder / "00000-000002.json").write_bytes(b'{"rows": ')
    (folder / "00000-000003.parquet").unlink()
    (folder / ".00000-000004.parquet.here-1.tmp").write_bytes(b"left by a kill")
    with interrupted(report, "as_markdown", 0):
        run(job(tmp_path))
    [final] = (tmp_path / "out.partial").glob("final-*")
    (final / "data" / ".train_sft-00000-of-00001.parquet.here-1.tmp").write_bytes(b"left by a kill")
    assert content(run(job(tmp_path))) == whole


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


@small
def test_machines_that_share_the_folder_give_the_same_bytes(tmp_path: Path):
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
