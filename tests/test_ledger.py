import asyncio
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zephyr.errors import UserError
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.request import Failure, Reply, Request

ROOT = Path(__file__).parents[1]


def key(number):
    return f"{number:064x}"


REPLY = Reply("a\0b \U0001f600 é", "m-0613", "stop", 10, 5, 4, 0.25, 1.5, 2, 0.5, '{"content": []}')
BARE = Reply("", "", "length")
FAILURE = Failure("timed_out", "no answer in time.", 6, 0.125)


def put(ledger, *entries):
    ledger.record(entries)


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


def test_only_one_process_writes_and_others_may_read(tmp_path):
    path = tmp_path / "l.sqlite"
    with Ledger(path) as ledger:
        put(ledger, (key(1), "m", REPLY))
        with pytest.raises(UserError, match=r"l.sqlite is being written by another process"):
            Ledger(path)
        with Ledger(path, read_only=True) as reader:
            assert reader.get(key(1)) == REPLY
            with pytest.raises(UserError, match="cannot be written"):
                put(reader, (key(2), "m", REPLY))
    with Ledger(path, read_only=True) as reader:
        assert reader.totals()[0].number == 1


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
        database.execute("PRAGMA user_version=3")
    with pytest.raises(UserError, match="c.sqlite was written by a newer Zephyr"):
        Ledger(newer)
    with pytest.raises(UserError, match="d.sqlite does not exist"):
        Ledger(tmp_path / "d.sqlite", read_only=True)


def test_a_ledger_of_the_first_version_is_read_as_it_is_and_takes_the_new_column_when_written(tmp_path):
    path = tmp_path / "l.sqlite"
    with Ledger(path) as ledger:
        put(ledger, (key(1), "m", BARE))
    with sqlite3.connect(path) as database:
        database.execute("ALTER TABLE replies DROP COLUMN extra")
        database.execute("PRAGMA user_version=1")
    with Ledger(path, read_only=True) as ledger:
        assert ledger.get(key(1)) == BARE
    with Ledger(path) as ledger:
        put(ledger, (key(2), "m", REPLY))
        assert list(ledger.entries()) == [(key(1), "m", BARE), (key(2), "m", REPLY)]


def test_put_returns_only_when_another_connection_can_see_it(tmp_path):
    path = tmp_path / "l.sqlite"

    async def one(ledger, reader, number):
        await ledger.put(key(number), "m", REPLY)
        return reader.execute("SELECT count(*) FROM replies WHERE key=?", (bytes.fromhex(key(number)),)).fetchone()[0]

    async def many():
        with Ledger(path) as ledger:
            reader = sqlite3.connect(path, isolation_level=None)
            commits = 0

            def counted(entries, record=ledger.record):
                nonlocal commits
                commits += 1
                record(entries)

            ledger.record = counted
            seen = await asyncio.gather(*(one(ledger, reader, number) for number in range(300)))
            reader.close()
            return seen, commits

    seen, commits = asyncio.run(many())
    assert seen == [1] * 300
    assert commits == 1


def test_what_cannot_be_written_is_said_to_everyone_who_waits(tmp_path):
    async def many():
        with Ledger(tmp_path / "l.sqlite") as ledger:
            ledger._database.execute("PRAGMA max_page_count=12")  # as a full disk
            big = Reply("x" * 50_000, "m", "stop")
            tasks = [ledger.put(key(n), "m", big) for n in range(3)]
            errors = await asyncio.gather(*tasks, return_exceptions=True)
            return errors, list(ledger.entries())

    errors, entries = asyncio.run(many())
    assert all(isinstance(error, UserError) and "database or disk is full" in str(error) for error in errors)
    assert entries == []


def test_cancelled_while_it_waits_the_entry_is_kept(tmp_path):
    async def cancelled():
        ledger = Ledger(tmp_path / "l.sqlite")
        first, second = (asyncio.create_task(ledger.put(key(n), "m", REPLY)) for n in (1, 2))
        await asyncio.sleep(0)
        first.cancel()
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        ledger.close()

    asyncio.run(cancelled())
    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert [ledger.get(key(n)) for n in (1, 2)] == [REPLY, REPLY]


WRITER = """
import asyncio, sys
from pathlib import Path
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.request import Reply

async def write(ledger, start):
    for number in range(start, 10**6, 16):
        await ledger.put(f"{number:064x}", "m", Reply("t" * 900 + str(number), "m", "stop"))
        print(number, flush=True)

async def main():
    ledger = Ledger(Path(sys.argv[1]))
    await asyncio.gather(*(write(ledger, start) for start in range(16)))

asyncio.run(main())
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
