"""MT-Bench (Zheng et al., 2023): two turns of 80 questions, judged; by FastChat's files."""

import re

_SCORES = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


def parse_score(text: str) -> float | None:
    """The score that a judge gave, by FastChat's rule: the first `[[7]]`, else the first `[7]`; None without either."""
    found = next((match for match in (pattern.search(text) for pattern in _SCORES) if match), None)
    return float(found[1]) if found else None
