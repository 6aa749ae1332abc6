"""Truecasing: the capitals that a message has lost, found and mended; nothing else is touched.

UltraChat has lower-case starts of messages and sentences, a lower-case pronoun "i", names in lower case and messages
without any capital; the subset that Zephyr was trained on was truecased (Tunstall et al., 2023, section 4.1; how was
not published). Here a change is made only where statistics of well-cased text and the message itself agree on it.
"""

import re
from functools import cache
from pathlib import Path

from zephyr.data.truecase.casing import Table
from zephyr.data.truecase.lowered import LowerMessage
from zephyr.data.truecase.mending import BOUNDARY, CAPITAL, LINE, Change, applied
from zephyr.data.truecase.odds import Odds

DEFAULT_TABLE = Path(__file__).with_name("casing.txt.gz")

_LETTERS = bytes(byte if chr(byte).isascii() and chr(byte).isalpha() else ord(" ") for byte in range(256))
_TOKENS = re.compile(r"\b[a-z]+(?:['’](?:m|ve|d|ll)\b)?")


class Truecaser:
    """Mends messages by a table's statistics."""

    def __init__(self, table: Table) -> None:
        self._odds = Odds(table)
        # of each name the longest piece in plain letters, which a look at the bytes can find; those with an i alone,
        # as the contractions of the pronoun, are found by that, where their ends would find "we've" and "they'll" too
        pieces = [_pieces(name) for name in self._odds.names]
        self._triggers = frozenset(max(found, key=len) for found in pieces if found and b"i" not in found) | {b"i"}

    def truecase(self, text: str) -> str:
        """The text with its lost capitals, of the same length."""
        changes = self.faults(text)
        return applied(text, changes) if changes else text

    def faults(self, text: str) -> list[Change]:
        """The changes that `truecase` makes, by position; a word is changed once."""
        # in a message that has a capital, a line that is not the first says nothing of where a sentence begins
        if (
            self._triggers.isdisjoint(_pieces(text))
            and not LINE.match(text)
            and CAPITAL.search(text)
            and not BOUNDARY.search(text)
        ):
            return []
        return LowerMessage(self._odds, text, frozenset(_TOKENS.findall(text))).changes()


def _pieces(text: str) -> list[bytes]:
    """The runs of plain letters; a superset of the words that may be names is found so in half of the time."""
    return text.encode(errors="replace").translate(_LETTERS).split()


def load(table: str) -> Table:
    """The table of a file; `default` is the one that comes with Zephyr. Raises UserError."""
    return Table.load(DEFAULT_TABLE if table == "default" else Path(table))


@cache
def default() -> Truecaser:
    """The truecaser of the table that comes with Zephyr."""
    return Truecaser(load("default"))


def faults(text: str) -> list[Change]:
    """The changes that `truecase` makes to a message, by position."""
    return default().faults(text)


def truecase(text: str) -> str:
    """A message with its lost capitals, of the same length; the table is loaded at the first call."""
    return default().truecase(text)
