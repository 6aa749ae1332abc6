"""What has been asked and paid for: an SQLite file of replies and failures, keyed by request.

A reply is handed to the system, in a transaction of its own, before anything else is done: however the process ends,
it is not asked for again. Onto the disk it goes within about a second, with others and in a thread, as waiting for a
disk takes longer than everything else about a request; only a machine that loses its power can lose that second.
"""

import contextlib
import fcntl
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from zephyr.errors import UserError, reason
from zephyr.feedback.request import Failure, Reply

_APPLICATION = 0x5A655048  # "ZePH" in the file's header, by which a ledger is known
_VERSION = 1
_LOCK_SECONDS = 15.0  # that another process is waited for
_SYNC_SECONDS = 1.0  # between two times that what was written is brought onto the disk
_LOG_FRAMES = 2**17  # pages of 4 KiB in the write-ahead log, which a reader searches through
# as the fields of Reply stand
_FIGURES = (
    *("finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens"),
    *("cost", "seconds", "attempts", "waste"),
)
_REPLY = f"text, returned_model, {', '.join(_FIGURES)}, extra"
# Keys are random, so they stand in an index of their own: rows are appended, however many there are. The texts come
# last, so that sums over a column need not read them.
_SCHEMA = """
CREATE TABLE replies (
    key BLOB PRIMARY KEY, at REAL, model TEXT, returned_model TEXT, finish_reason TEXT, prompt_tokens INTEGER,
    completion_tokens INTEGER, cached_tokens INTEGER, cost REAL, seconds REAL, attempts INTEGER, waste REAL, text TEXT,
    extra TEXT
);
CREATE TABLE failures (
    key BLOB PRIMARY KEY, at REAL, model TEXT, run INTEGER, cause TEXT, attempts INTEGER, waste REAL, detail TEXT
);
CREATE TRIGGER answered AFTER INSERT ON replies BEGIN DELETE FROM failures WHERE key = new.key; END;
"""
_GET_REPLY = f"SELECT {_REPLY} FROM replies WHERE key=?"
# a reply that stands is never replaced: it is the one that was used
_PUT_REPLY = f"INSERT OR IGNORE INTO replies VALUES ({', '.join('?' * 14)})"
_PUT_FAILURE = f"INSERT OR REPLACE INTO failures VALUES ({', '.join('?' * 8)})"


class Total(NamedTuple):
    """Sums over the replies of a model (cause None), or over its failures of one cause."""

    model: str  # its name in the pool
    cause: str | None
    number: int
    attempts: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cost: float  # USD
    waste: float  # USD
    seconds: float


Entry = tuple[str, str, Reply | Failure]  # key, name of the model in the pool, outcome


class Ledger:
    """The file at `path`, created where there is none. One process writes; any may read with `read_only=True`.

    Raises UserError for a file that is no ledger, is of a newer version, or is being written by another process.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path, self._read_only = path, read_only
        if read_only and not path.is_file():
            raise UserError(f"{path} does not exist, so there is no ledger to read.")
        if not read_only:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_file = _locked(path)
        try:
            self._database = _connected(path, "ro" if read_only else "rwc")
            self._create()
            query = "SELECT key, run, cause, detail, attempts, waste FROM failures"
            # in memory too, as they are few, and every request asks for its own
            self._failures = {key: (run, Failure(*said)) for key, run, *said in self._database.execute(query)}
        except sqlite3.Error as error:
            raise UserError(f"{path} cannot be used as a ledger: {reason(error)}") from error
        self.run = 1 + max((run for run, _ in self._failures.values()), default=0)
        self._closing = threading.Event()
        self._syncing = threading.Thread(target=self._sync, name="ledger", daemon=True)
        if not read_only:
            self._syncing.start()

    def _create(self) -> None:
        known = self._database.execute("PRAGMA application_id").fetchone()[0]
        (tables,) = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if known != _APPLICATION and (tables or self._read_only):
            raise UserError(f"{self.path} is a database, but no ledger. Name another file.")
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        if version > _VERSION:
            raise UserError(f"{self.path} was written by a newer Zephyr (version {version} of the ledger). Upgrade.")
        if self._read_only:
            return
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA cache_size=-131072")  # 128 MiB: the keys of some million replies
        self._database.execute("PRAGMA synchronous=NORMAL")  # a commit does not wait for the disk
        self._database.execute("PRAGMA wal_autocheckpoint=0")  # nor does one in a thousand
        if not tables:
            header = f"PRAGMA application_id={_APPLICATION}; PRAGMA user_version={_VERSION};"
            self._database.executescript(f"BEGIN;{_SCHEMA}{header}COMMIT;")

    def _sync(self) -> None:
        """Bring the write-ahead log onto the disk, and into the file, now and then; writing goes on beside it."""
        with contextlib.closing(_connected(self.path, "rw")) as database:
            while not self._closing.wait(_SYNC_SECONDS):
                with contextlib.suppress(sqlite3.Error):  # whoever writes next is told
                    _, frames, _ = database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                    if frames > _LOG_FRAMES:
                        # who writes all the time gets ahead of each of these; the last one makes him wait, for what
                        # little the second has left over, and begin the log anew
                        database.execute("PRAGMA wal_checkpoint(PASSIVE)")
                        database.execute("PRAGMA wal_checkpoint(RESTART)")

    def get(self, key: str) -> Reply | Failure | None:
        """The reply to a request; or how it failed in this run; None where it is still to be asked."""
        found = self._database.execute(_GET_REPLY, (bytes.fromhex(key),)).fetchone()
        if found:
            return Reply(*found)
        run, failure = self._failures.get(bytes.fromhex(key), (0, None))
        return failure if run == self.run else None

    def earlier(self, key: str) -> tuple[int, float]:
        """Attempts and waste (USD) of a request that failed in an earlier run."""
        _, failure = self._failures.get(bytes.fromhex(key), (0, None))
        return (failure.attempts, failure.waste) if failure else (0, 0.0)

    def put(self, key: str, model: str, outcome: Reply | Failure) -> None:
        """Kept when this returns, whatever happens to the process. Raises UserError where it cannot be: a full disk."""
        if isinstance(outcome, Reply):
            figures = (getattr(outcome, field) for field in _FIGURES)
            row = (bytes.fromhex(key), time.time(), model, outcome.model, *figures, outcome.text, outcome.extra)
            self._write(_PUT_REPLY, row)
        else:
            self._put_failure(key, model, outcome)
            self._failures[bytes.fromhex(key)] = self.run, outcome

    def sending(self, key: str, model: str, attempts: int, waste: float) -> None:
        """An attempt goes out, the last of so many: a failure in the next run's eyes, unless an outcome is put."""
        self._put_failure(
            key, model, Failure("interrupted", "The run was killed before an answer came.", attempts, waste)
        )

    def _put_failure(self, key: str, model: str, failure: Failure) -> None:
        failed = (failure.cause, failure.attempts, failure.waste, failure.detail)
        self._write(_PUT_FAILURE, (bytes.fromhex(key), time.time(), model, self.run, *failed))

    def _write(self, statement: str, row: Sequence[Any]) -> None:
        try:
            self._database.execute(statement, row)
        except sqlite3.Error as error:
            raise UserError(f"the ledger {self.path} cannot be written: {reason(error)}") from error

    def entries(self) -> Iterator[Entry]:
        """Every reply in the order of recording, then every failure of any run that has had no reply since."""
        query = f"SELECT key, model, {_REPLY} FROM replies ORDER BY rowid"
        for key, model, *reply in self._database.execute(query):
            yield key.hex(), model, Reply(*reply)
        query = "SELECT key, model, cause, detail, attempts, waste FROM failures ORDER BY rowid"
        for key, model, *failure in self._database.execute(query):
            yield key.hex(), model, Failure(*failure)

    def totals(self) -> list[Total]:
        """Sums by model and cause; replies first. A scan: seconds at a million rows."""
        sums = "sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens), sum(cost), sum(waste), sum(seconds)"
        queries = (
            f"SELECT model, NULL, count(*), sum(attempts), {sums} FROM replies GROUP BY model",
            "SELECT model, cause, count(*), sum(attempts), 0, 0, 0, 0, sum(waste), 0 FROM failures "
            "GROUP BY model, cause",
        )
        rows = [row for query in queries for row in self._database.execute(query)]
        return [Total(row[0], row[1], *(value or 0 for value in row[2:])) for row in rows]

    def close(self) -> None:
        """Leave one file behind: the write-ahead log is taken into it."""
        if self._read_only:
            self._database.close()
            return
        self._closing.set()
        self._syncing.join()
        with contextlib.suppress(sqlite3.OperationalError):  # somebody reads it: the log stays, which is as good
            self._database.execute("PRAGMA journal_mode=DELETE")
        self._database.close()
        self._lock_file.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _connected(path: Path, mode: str) -> sqlite3.Connection:
    """With no transactions of the standard library's own: each statement is one."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None)


def _locked(path: Path) -> BinaryIO:
    """Hold a lock beside the ledger: beside, as closing any handle of the file itself drops SQLite's own locks. Who
    holds it stands in it. Waited for is a run that was killed and ends what was under way, which can be told from
    one that goes on by nothing but that it ends."""
    file = open(path.with_name(path.name + ".lock"), "a+b", 0)  # noqa: SIM115 - held as long as the ledger
    ours = f"process {os.getpid()} on {os.uname().nodename}"
    deadline = time.monotonic() + _LOCK_SECONDS
    waits = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = _holder(file)
            if time.monotonic() > deadline:
                file.close()
                said = f"{path} is being written by {who}. Wait for it, or name another output."
                raise UserError(said) from error
            if not waits:
                waits = True
                how_long = f"which gets {_LOCK_SECONDS:g} s to end"
                print(f"Note: {path} is being written by {who}, {how_long}.", file=sys.stderr)
            time.sleep(0.05)
        except OSError as error:
            file.close()
            raise UserError(f"{path} cannot be locked: {error.strerror}. Name an output on another disk.") from error
        else:
            with contextlib.suppress(OSError):  # on a full disk the ledger says so
                file.truncate(0)
                file.write(ours.encode())
            return file


def _holder(file: BinaryIO) -> str:
    return os.pread(file.fileno(), 200, 0).decode(errors="replace") or "another process"
