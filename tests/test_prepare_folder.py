"""Whose folder a preparation writes to, and how one ends that cannot go on: a mistake, a defect, a kill, a signal."""

import signal
from pathlib import Path

import pytest

from tests.prepared import content, interrupted, read, small, start, wait_for_parts
from tests.preparing import SIZES, Shout, dialogue, job, lines
from zephyr.errors import UserError
from zephyr.prepare import parts, report
from zephyr.prepare.engine import make_parts, run


@small
def test_what_is_there_already_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
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


@small
def test_nothing_of_others_is_touched(tmp_path: Path):
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


@small
def test_other_settings_start_afresh(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    whole = content(run(job(tmp_path, seed=4, output=str(tmp_path / "whole"))))
    with interrupted(parts, "write_json", 3):
        run(job(tmp_path))
    with pytest.raises(UserError, match="was begun with other input, settings or code. Remove it"):
        make_parts(job(tmp_path, seed=4))  # others may be at work in it
    assert content(run(job(tmp_path, seed=4))) == whole
    assert "Started afresh: " in capsys.readouterr().out


@small
def test_sizes_can_change_without_starting_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with interrupted(report, "as_markdown", 0):
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


@small
def test_a_killed_worker_is_said(tmp_path: Path):
    with pytest.raises(UserError, match="A process that prepares the data was killed"):
        run(job(tmp_path, work=Shout(die_at="question 30"), processes=2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("processes", [1, 2])
@small
def test_the_first_bad_row_is_an_error(processes: int, tmp_path: Path):
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


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_in_order(signum: signal.Signals, tmp_path: Path):
    job(tmp_path, [dialogue(n) for n in range(4000)])
    process = start(tmp_path)
    wait_for_parts(tmp_path, process, 2)
    process.send_signal(signum)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert error.splitlines() == [f"Stopped by {signum.name}. The same command goes on."]
    assert not list((tmp_path / "out.partial" / "parts").glob(".*.tmp"))
