"""The truecaser's table, counted anew on your own text."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zephyr.data import pool, sources
from zephyr.data.messages import BadRow, Row
from zephyr.data.sources import Chunk
from zephyr.data.truecase import load
from zephyr.data.truecase.casing import Table, learn, merge
from zephyr.errors import UserError, check_writable
from zephyr.prepare.folder import durable
from zephyr.prepare.settings import Casing
from zephyr.settings import build

_LOST = "A process that counts was killed, perhaps for want of memory. Free some, or set processes=1."
_ROWS, _BYTES = 20_000, 16_000_000  # of a piece: its table is sent back and added to the others


def run(config: dict[str, Any]) -> Path:
    """The command. Raises UserError."""
    settings = build(Casing, config)
    output = Path(settings.output).expanduser()
    if output.exists():
        raise UserError(f"output: {output} is there already. Remove it, or give another file.")
    if not output.parent.is_dir():
        raise UserError(f"output: there is no folder {output.parent}.")
    check_writable(output, "output")
    onto = [] if settings.onto is None else [load(settings.onto)]
    pieces = (
        chunk for path in sources.files(settings.input, "input") for chunk in sources.file_chunks(path, _ROWS, _BYTES)
    )
    tables = pool.ordered(_counter, pieces, settings.processes or pool.cores(), _LOST)
    table = merge(tables)
    if not table.words:
        raise UserError(f"input: {settings.input} holds no text to count.")
    with durable(output) as path:
        merge([*onto, table]).pruned().save(path)
    print(f"{table.words:,} words counted: {output}. Use it as truecase={output}.")
    return output


def count(chunk: Chunk) -> Table:
    """The counts of a piece; rows that cannot be used are left out."""
    return learn(text for row in chunk.rows() if not isinstance(row, BadRow) for text in texts(row))


def texts(row: Row) -> Iterator[str]:
    """The texts of a row: its `text`, or a dialogue's messages. Raises UserError where it has neither."""
    where, columns = row
    if isinstance(columns.get("text"), str):
        yield columns["text"]
        return
    if not {"messages", "data"} & columns.keys():
        raise UserError(f"{where}: counting needs the column text, messages or data; found {', '.join(columns)}.")
    try:
        yield from (message["content"] for message in sources.turns(row))
    except BadRow:
        return


def _counter() -> Callable[[Chunk], Table]:
    """What counts in a process of the pool: it needs nothing made."""
    return count
