"""Truecasing: the capitals that a message has lost, found and mended; nothing else is touched.

UltraChat has lower-case starts of messages and sentences, a lower-case pronoun "i", names in lower case and messages
without any capital; the subset that Zephyr was trained on was truecased (Tunstall et al., 2023, section 4.1; how was
not published). Here a change is made only where statistics of well-cased text and the message itself agree on it.
"""

import re
from functools import cache
from pathlib import Path

from zephyr.data.casing import Table
from zephyr.data.lowered import LowerMessage
from zephyr.data.mending import BOUNDARY, CAPITAL, CONTRACTIONS, LINE, Change
from zephyr.data.odds import Odds

DEFAULT_TABLE = Path(__file__).with_name("casing.txt.gz")

_TOKENS = re.compile(r"\b[a-z]+(?:['’](?:m|ve|d|ll)\b)?")


class Truecaser:
    """Mends messages by a table's statistics."""

    def __init__(self, table: Table) -> None:
        self._odds = Odds(table)
        self._triggers = frozenset(self._odds.names) | CONTRACTIONS

    def truecase(self, text: str) -> str:
        """The text with its lost capitals, of the same length."""
        changes = self.faults(text)
        if not changes:
            return text
        parts: list[str] = []
        end = 0
        for change in changes:
            parts += (text[end : change.start], change.after)
            end = change.start + len(change.before)
        return "".join(parts) + text[end:]

    def faults(self, text: str) -> list[Change]:
        """The changes that `truecase` makes, by position; a word is changed once."""
        tokens = _TOKENS.findall(text)
        if (
            self._triggers.isdisjoint(tokens)
            and CAPITAL.search(text)
            and not BOUNDARY.search(text)
            and not LINE.search(text)
        ):
            return []
        return LowerMessage(self._odds, text, frozenset(tokens)).changes()


@cache
def default() -> Truecaser:
    """The truecaser of the table that comes with Zephyr."""
    return Truecaser(Table.load(DEFAULT_TABLE))


def faults(text: str) -> list[Change]:
    """The changes that `truecase` makes to a message, by position."""
    return default().faults(text)


def truecase(text: str) -> str:
    """A message with its lost capitals, of the same length; the table is loaded at the first call."""
    return default().truecase(text)
