"""Which runs an ablation is made of, and the command of each. What several arms share is trained once a seed."""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zephyr.study.settings import Ablation

TRAIN = Path(__file__).parents[2] / "train.py"
SFT, SECOND, ALONE, DPO = "sft", "sft-2", "dpo-alone", "dpo"
ARMS = {  # in the order of the paper's table 3
    ALONE: "dDPO without dSFT",
    SFT: "dSFT-1",
    SECOND: "dSFT-2",
    DPO: "dDPO + dSFT",
}
_PLAIN = re.compile(r"[\w./:@+-]+")


@dataclass(frozen=True)
class Run:
    """One run of train.py, in a folder of its own."""

    seed: int
    arm: str  # of ARMS, or dpo-N-epochs
    folder: Path
    parent: "Run | None"  # whose model it starts from
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"seed-{self.seed}/{self.arm}"

    def command(self, *more: str) -> list[str]:
        """As a user would type it."""
        return [sys.executable, str(TRAIN), *self.overrides, *more]


def after(epochs: int) -> str:
    """The arm with so many epochs of dDPO behind dSFT."""
    return DPO if epochs == 1 else f"{DPO}-{epochs}-epochs"


def plan(settings: Ablation, dpo: dict[str, Any]) -> list[Run]:
    """Every run, parents before their children. `dpo` is the configuration of the recipe's second stage."""
    output, model = Path(settings.output), dpo["model"]
    base = [override("model.path", model["base"])]
    base += [override("model.revision", model["base_revision"])] if model["base_revision"] else []
    chosen = [override(f"data.{side}", str(path)) for side, path in chats(output).items() if dpo["data"][side]]
    chosen += [] if dpo["data"]["validation"] else ["data.validation=null"]
    runs: list[Run] = []
    for seed in settings.seeds:

        def add(arm: str, stage: str, parent: Run | None, *own: str, epochs: int = 1, seed: int = seed) -> Run:
            folder = output / f"seed-{seed}" / arm
            start = [override("model.path", str(parent.folder / "model"))] if parent else []
            overrides = [f"recipe={settings.recipe}", f"stage={stage}", f"seed={seed}", f"trainer.max_epochs={epochs}"]
            overrides += [*start, *own, *wanted(settings, stage)]
            runs.append(Run(seed, arm, folder, parent, (*overrides, override("output_dir", str(folder)))))
            return runs[-1]

        first = add(SFT, "sft", None)
        add(SECOND, "sft", first, *chosen)
        add(ALONE, "dpo", None, *base)
        for epochs in range(1, settings.epochs + 1):
            add(after(epochs), "dpo", first, epochs=epochs)
    return runs


def wanted(settings: Ablation, stage: str) -> list[str]:
    """The user's overrides of every run of a stage."""
    return [*shlex.split(settings.train), *shlex.split(settings.sft if stage == "sft" else settings.dpo)]


def chats(output: Path) -> dict[str, Path]:
    """Where the chosen answers of the preference data are kept, as conversations for the second round of dSFT."""
    return {side: output / "data" / f"chosen-{side}.jsonl" for side in ("train", "validation")}


def override(key: str, value: str) -> str:
    """key=value, quoted where the value has characters that mean something to Hydra."""
    if _PLAIN.fullmatch(value):
        return f"{key}={value}"
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", r"\'"), value)
    return f"{key}='{escaped}'"
