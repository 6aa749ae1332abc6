"""Every key of `python -m zephyr.study ablation`, with its type and unit. Defaults live in conf/study/ablation.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zephyr.errors import UserError
from zephyr.evaluation.settings import Benchmark
from zephyr.settings import Count, Seed, Text, build


@dataclass(frozen=True)
class Ablation:
    """python -m zephyr.study ablation"""

    recipe: Text
    output: Text
    seeds: Sequence[Seed]
    epochs: Count  # the most passes of dDPO
    train: str  # overrides of every run of train.py, as on its command line
    sft: str
    dpo: str
    questions: Count
    benchmarks: Sequence[Benchmark]
    evaluate: str  # overrides of python -m zephyr.evaluate
    dry_run: bool

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds={list(self.seeds)} must be one or more different numbers.")


def parse(config: dict[str, Any]) -> Ablation:
    """Check a composed configuration and turn it into settings. Raises UserError at the first mistake."""
    return build(Ablation, config)
