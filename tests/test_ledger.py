import errno
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from zephyr.errors import UserError
from zephyr.feedback import ledger as module
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.request import Failure, Reply, Request

ROOT = Path(__file__).parents[1]


def key(number):
    return f"{number:064x}"


REPLY = Reply("a\0b \U0001f600 é", "m-0613", "stop", 10, 5, 4, 0.25, 1.5, 2, 0.5, '{"content": []}')
BARE = Reply("", "", "length")
FAILURE = Failure("timed_out", "no answer in time.", 6, 0.125)


def put(ledger, *entries):
    for entry in entries:
        ledger.put(*entry)


def test_the_key_is_all_that_decides_the_answer_and_nothing_else():
    """The hash was worked out by hand from the canonical JSON below, once."""
    import hashlib

    text = '["m",[{"content":"h\\u00e9","role":"user"}],{"max_tokens":5,"temperature":1},null,0]'
    hello = [{"role": "user", "content": "hé"}]
    plain = Request("m", hello, {"temperature": 1.0, "max_tokens": 5})
    assert plain.key == hashlib.sha256(text.encode()).hexdigest()
    same = Request("m", ({"content": "hé", "role": "user"},), {"max_tokens": 5, "temperature": 1})
    assert same.key == plain.key
    others = [
        Request("n", hello, {"temperature": 1.0, "max_tokens": 5}),
        Request("m", [*hello, *hello], {"temperature": 1.0, "max_tokens": 5}),
        Request("m", hello, {"temperature": 0.5, "max_tokens": 5}),
        Request("m", hello, {"temperature": 1.0}),
        Request("m", hello, {"temperature": 1.0, "max_tokens": 5}, schema={"type": "object"}),
        Request("m", hello, {"temperature": 1.0, "max_tokens": 5}, sample=1),
    ]
    assert len({request.key for request in [plain, *others]}) == 7
    with pytest.raises(ValueError):
        Request("m", hello, {"temperature": float("nan")}).key  # noqa: B018


def test_what_is_recorded_comes_back_after_reopening(tmp_path):
    path = tmp_path / "deep" / "ledger.sqlite"
    with Ledger(path) as ledger:
        assert ledger.get(key(1)) is None
        put(ledger, (key(1), "m", REPLY), (key(2), "m", BARE), (key(3), "n", FAILURE))
        assert [ledger.get(key(n)) for n in (1, 2, 3, 4)] == [REPLY, BARE, FAILURE, None]
    assert sorted(file.name for file in path.parent.iterdir()) == ["ledger.sqlite", "ledger.sqlite.lock"]
    with Ledger(path) as ledger:
        assert [ledger.get(key(n)) for n in (1, 2)] == [REPLY, BARE]
        assert ledger.get(key(3)) is None  # a failure is final for its run only
        assert ledger.earlier(key(3)) == (6, 0.125)
        assert list(ledger.entries()) == [(key(1), "m", REPLY), (key(2), "m", BARE), (key(3), "n", FAILURE)]


def test_a_reply_is_never_replaced_and_takes_the_failures_place(tmp_path):
    with Ledger(tmp_path / "l.sqlite") as ledger:
        put(ledger, (key(1), "m", FAILURE))
        put(ledger, (key(1), "m", REPLY))
        put(ledger, (key(1), "m", BARE))
        assert list(ledger.entries()) == [(key(1), "m", REPLY)]


def test_totals_by_model_and_cause(tmp_path):
    """By hand: two replies of m (attempts 2 + 1), one failure of n."""
    with Ledger(tmp_path / "l.sqlite") as ledger:
        put(ledger, (key(1), "m", REPLY), (key(2), "m", BARE), (key(3), "n", FAILURE))
        assert [tuple(total) for total in ledger.totals()] == [
            ("m", None, 2, 3, 10, 5, 4, 0.25, 0.5, 1.5),
            ("n", "timed_out", 1, 6, 0, 0, 0, 0, 0.125, 0),
        ]


def test_only_one_process_writes_and_others_may_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.1)
    path = tmp_path / "l.sqlite"
    with Ledger(path) as ledger:
        put(ledger, (key(1), "m", REPLY))
        with pytest.raises(UserError, match=rf"l.sqlite is being written by process {os.getpid()} on "):
            Ledger(path)
        with Ledger(path, read_only=True) as reader:
            assert reader.get(key(1)) == REPLY
            with pytest.raises(UserError, match="cannot be written"):
                put(reader, (key(2), "m", REPLY))
    with Ledger(path, read_only=True) as reader:
        assert reader.totals()[0].number == 1


def test_whose_ledger_is_waited_for_is_said_at_once(tmp_path, capsys):
    path = tmp_path / "l.sqlite"
    (tmp_path / "l.sqlite.lock").write_text("process 1 of long ago, on a machine with a long name")
    first = Ledger(path)
    waiting = threading.Thread(target=lambda: Ledger(path).close())
    started = time.monotonic()
    waiting.start()
    while not (said := capsys.readouterr().err):
        assert time.monotonic() - started < 10
        time.sleep(0.01)
    who = f"process {os.getpid()} on {os.uname().nodename}"
    assert said == f"Note: {path} is being written by {who}, which gets 15 s to end.\n"
    first.close()
    waiting.join(10)
    assert not waiting.is_alive() and capsys.readouterr().err == ""


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with pytest.raises(UserError, match="l.sqlite cannot be locked: No locks available. Name an output"):
        Ledger(tmp_path / "l.sqlite")


def test_a_file_that_is_no_ledger_is_left_alone(tmp_path):
    text, other, newer = tmp_path / "a.sqlite", tmp_path / "b.sqlite", tmp_path / "c.sqlite"
    text.write_text("something else, and quite long enough to be seen as no database at all")
    with pytest.raises(UserError, match="a.sqlite cannot be used as a ledger: file is not a database."):
        Ledger(text)
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE t (x)")
    with pytest.raises(UserError, match="b.sqlite is a database, but no ledger"):
        Ledger(other)
    Ledger(newer).close()
    with sqlite3.connect(newer) as database:
        database.execute("PRAGMA user_version=2")
    with pytest.raises(UserError, match="c.sqlite was written by a newer Zephyr"):
        Ledger(newer)
    with pytest.raises(UserError, match="d.sqlite does not exist"):
        Ledger(tmp_path / "d.sqlite", read_only=True)


def test_when_put_returns_another_connection_can_see_it(tmp_path):
    path = tmp_path / "l.sqlite"
    with Ledger(path) as ledger, Ledger(path, read_only=True) as reader:
        for number in range(300):
            put(ledger, (key(number), "m", REPLY))
            assert reader.get(key(number)) == REPLY


def test_what_was_written_is_brought_onto_the_disk_while_writing_goes_on(tmp_path, monkeypatch):
    """A copy of the file alone, without its write-ahead log, is what a machine without power would find."""
    monkeypatch.setattr(module, "_SYNC_SECONDS", 0.02)
    path, found = tmp_path / "l.sqlite", tmp_path / "found.sqlite"
    with Ledger(path) as ledger:
        put(ledger, (key(1), "m", REPLY))
        deadline = time.monotonic() + 20
        while True:
            put(ledger, (key(2), "m", REPLY))
            found.write_bytes(path.read_bytes())
            with sqlite3.connect(found) as database, suppress(sqlite3.OperationalError):
                if database.execute("SELECT count(*) FROM replies").fetchone() == (2,):
                    break
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_the_log_begins_anew_under_a_writer_that_never_rests(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SYNC_SECONDS", 0.02)
    monkeypatch.setattr(module, "_LOG_FRAMES", 500)
    number, deadline = 0, time.monotonic() + 60
    with Ledger(tmp_path / "l.sqlite") as ledger:
        while True:
            for _ in range(1000):
                number += 1
                put(ledger, (key(number), "m", REPLY))
            written = 2 * 4096 * number  # each reply writes two pages at least: of the rows, and of their keys
            if (tmp_path / "l.sqlite-wal").stat().st_size < written / 2:
                break
            assert time.monotonic() < deadline


def test_what_cannot_be_written_is_said(tmp_path):
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger._database.execute("PRAGMA max_page_count=12")  # as a full disk
        with pytest.raises(UserError, match="l.sqlite cannot be written: database or disk is full"):
            put(ledger, (key(1), "m", Reply("x" * 50_000, "m", "stop")))
        assert list(ledger.entries()) == []


WRITER = """
import sys
from pathlib import Path
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.request import Reply

ledger = Ledger(Path(sys.argv[1]))
for number in range(10**6):
    ledger.put(f"{number:064x}", "m", Reply("t" * 900 + str(number), "m", "stop"))
    print(number, flush=True)
"""


def test_killed_at_any_moment_whatever_was_said_to_be_kept_is_kept(tmp_path):
    path, draw = tmp_path / "l.sqlite", random.Random(0)
    said = set()
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        said.add(int(process.stdout.readline()))
        time.sleep(draw.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        said |= {int(line) for line in process.stdout.read().split("\n")[:-1]}
        process.wait()
    with Ledger(path) as ledger:
        for number in said:
            assert ledger.get(key(number)).text.endswith(str(number))
        assert ledger._database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert len(said) > 16
