"""What has been asked and paid for: an SQLite file of replies and failures, keyed by request.

A reply is committed, and synced to the disk, before anything uses it, so neither a killed process nor a lost machine
makes it be paid for again. Commits are made in groups, of what arrives within a few milliseconds and while one is under
way.
"""

import asyncio
import contextlib
import fcntl
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from zephyr.errors import UserError, reason
from zephyr.feedback.request import Failure, Reply

_APPLICATION = 0x5A655048  # "ZePH" in the file's header, by which a ledger is known
_VERSION = 2  # 1 had no column `extra`
_GROUP_SECONDS = 0.004  # that a reply waits for others: a commit costs as much processor time as a request
_ROWS = 1000  # of a statement; SQLite takes 32,766 values
# as the fields of Reply stand
_FIGURES = (
    *("finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens"),
    *("cost", "seconds", "attempts", "waste"),
)
_REPLY = f"text, returned_model, {', '.join(_FIGURES)}, extra"
# Keys are random, so they stand in an index of their own: rows are appended, however many there are. The text comes
# last, so that sums over a column need not read it.
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
        self.path = path
        self._lock = threading.Lock()
        self._pending: list[tuple[Entry, asyncio.Future[None]]] = []
        self._committing = False
        if read_only and not path.is_file():
            raise UserError(f"{path} does not exist, so there is no ledger to read.")
        if not read_only:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_file = _locked(path)
        try:
            uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
            # no statement of the standard library's own: the groups are ours
            self._database = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
            self._create(read_only)
            (last,) = self._database.execute("SELECT coalesce(max(run), 0) FROM failures").fetchone()
        except sqlite3.Error as error:
            raise UserError(f"{path} cannot be used as a ledger: {reason(error)}") from error
        self.run = last + 1
        self._reader = self._database
        if not read_only:  # its own connection: look-ups must not wait for a commit's sync
            self._reader = sqlite3.connect(path, isolation_level=None)
            self._thread = ThreadPoolExecutor(1, "ledger")
        self._read_only = read_only

    def _create(self, read_only: bool) -> None:
        known = self._database.execute("PRAGMA application_id").fetchone()[0]
        (tables,) = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if known != _APPLICATION and (tables or read_only):
            raise UserError(f"{self.path} is a database, but no ledger. Name another file.")
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        if version > _VERSION:
            raise UserError(f"{self.path} was written by a newer Zephyr (version {version} of the ledger). Upgrade.")
        self._columns = _REPLY if version != 1 else _REPLY.replace("extra", "NULL")
        if read_only:
            return
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        if not tables:
            header = f"PRAGMA application_id={_APPLICATION}; PRAGMA user_version={_VERSION};"
            self._database.executescript(f"BEGIN;{_SCHEMA}{header}COMMIT;")
        elif version == 1:
            added = f"ALTER TABLE replies ADD COLUMN extra TEXT; PRAGMA user_version={_VERSION};"
            self._database.executescript(f"BEGIN;{added}COMMIT;")
            self._columns = _REPLY

    def get(self, key: str) -> Reply | Failure | None:
        """The reply to a request; or how it failed in this run; None where it is still to be asked."""
        query = f"SELECT {self._columns} FROM replies WHERE key=?"
        found = self._reader.execute(query, (bytes.fromhex(key),)).fetchone()
        if found:
            return Reply(*found)
        failure = self._failure(key)
        return failure[1] if failure and failure[0] == self.run else None

    def earlier(self, key: str) -> tuple[int, float]:
        """Attempts and waste (USD) of a request that failed in an earlier run."""
        failure = self._failure(key)
        return (failure[1].attempts, failure[1].waste) if failure else (0, 0.0)

    def _failure(self, key: str) -> tuple[int, Failure] | None:
        query = "SELECT run, cause, detail, attempts, waste FROM failures WHERE key=?"
        found = self._reader.execute(query, (bytes.fromhex(key),)).fetchone()
        return (found[0], Failure(*found[1:])) if found else None

    async def put(self, key: str, model: str, outcome: Reply | Failure) -> None:
        """Returns when the outcome is on the disk. Raises UserError where it cannot be written (a full disk)."""
        done = asyncio.get_running_loop().create_future()
        self._pending.append(((key, model, outcome), done))
        self._soon()
        await done

    def _soon(self) -> None:
        if self._pending and not self._committing:
            self._committing = True
            asyncio.get_running_loop().call_later(_GROUP_SECONDS, self._commit)

    def _commit(self) -> None:
        group, self._pending = self._pending, []
        task = asyncio.get_running_loop().run_in_executor(self._thread, self.record, [entry for entry, _ in group])
        task.add_done_callback(lambda task: self._committed(task, [done for _, done in group]))

    def _committed(self, task: asyncio.Future[None], group: list[asyncio.Future[None]]) -> None:
        error = task.exception()
        for done in group:
            if not done.done():  # who waited may have been cancelled
                done.set_exception(error) if error else done.set_result(None)
        self._committing = False
        self._soon()

    def record(self, entries: Sequence[Entry]) -> None:
        """As `put`, for many at once, without a loop."""
        now = time.time()
        replies = [
            (bytes.fromhex(key), now, name, r.model, *(getattr(r, field) for field in _FIGURES), r.text, r.extra)
            for key, name, r in entries
            if isinstance(r, Reply)
        ]
        failures = [
            (bytes.fromhex(key), now, name, self.run, f.cause, f.attempts, f.waste, f.detail)
            for key, name, f in entries
            if isinstance(f, Failure)
        ]
        with self._lock:
            try:
                # a reply that stands is never replaced: it is the one that was used
                self._insert("IGNORE INTO replies", replies)
                self._insert("REPLACE INTO failures", failures)
            except sqlite3.Error as error:
                raise UserError(f"the ledger {self.path} cannot be written: {reason(error)}") from error

    def _insert(self, into: str, rows: list[tuple]) -> None:
        """One statement, which is its own transaction, for many rows: each statement costs two switches of threads."""
        for start in range(0, len(rows), _ROWS):
            some = rows[start : start + _ROWS]
            values = ",".join(["(" + ",".join("?" * len(rows[0])) + ")"] * len(some))
            self._database.execute(f"INSERT OR {into} VALUES {values}", [value for row in some for value in row])

    def entries(self) -> Iterator[Entry]:
        """Every reply in the order of recording, then every failure of any run that has had no reply since."""
        query = f"SELECT key, model, {self._columns} FROM replies ORDER BY rowid"
        for key, model, *reply in self._reader.execute(query):
            yield key.hex(), model, Reply(*reply)
        query = "SELECT key, model, cause, detail, attempts, waste FROM failures ORDER BY rowid"
        for key, model, *failure in self._reader.execute(query):
            yield key.hex(), model, Failure(*failure)

    def totals(self) -> list[Total]:
        """Sums by model and cause; replies first. A scan: seconds at a million rows."""
        sums = "sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens), sum(cost), sum(waste), sum(seconds)"
        queries = (
            f"SELECT model, NULL, count(*), sum(attempts), {sums} FROM replies GROUP BY model",
            "SELECT model, cause, count(*), sum(attempts), 0, 0, 0, 0, sum(waste), 0 FROM failures "
            "GROUP BY model, cause",
        )
        rows = [row for query in queries for row in self._reader.execute(query)]
        return [Total(row[0], row[1], *(value or 0 for value in row[2:])) for row in rows]

    def close(self) -> None:
        """Leave one file behind: the write-ahead log is taken into it."""
        if self._read_only:
            self._database.close()
            return
        self._thread.shutdown()
        if self._pending:  # who waited for these has been cancelled, but they are paid for
            self.record([entry for entry, _ in self._pending])
        self._reader.close()
        with contextlib.suppress(sqlite3.OperationalError):  # somebody reads it: the log stays, which is as good
            self._database.execute("PRAGMA journal_mode=DELETE")
        self._database.close()
        self._lock_file.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _locked(path: Path):  # type: ignore[no-untyped-def]
    """Hold a lock beside the ledger: beside, as closing any handle of the file itself drops SQLite's own locks."""
    file = open(path.with_name(path.name + ".lock"), "w")  # noqa: SIM115 - held as long as the ledger
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise UserError(f"{path} is being written by another process. Wait for it, or name another output.") from error
    return file
