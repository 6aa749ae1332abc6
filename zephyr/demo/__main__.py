"""What the demo's preferences changed: `python -m zephyr.demo [OUTPUTS]`, after both stages have run.

A model that learned from feedback on the SFT model's own answers is shown beside theirs where there is one.
"""

import argparse
import json
import sys
from pathlib import Path
from string import Formatter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from zephyr.demo import locate
from zephyr.demo.teacher import score
from zephyr.errors import UserError

STAGES = {"sft": "python train.py", "dpo": "python train.py stage=dpo"}
OWN = "dpo-feedback"
NAMES = {"sft": "SFT", "dpo": "DPO", OWN: "DPO on own feedback"}
QUESTIONS, EXAMPLES, MAX_NEW_TOKENS = 200, 6, 64


def main() -> int:
    """Compare the stages' models, write `OUTPUTS/report.json`, print it; the result is the exit status."""
    parser = argparse.ArgumentParser(prog="python -m zephyr.demo", description=__doc__)
    parser.add_argument("outputs", nargs="?", default="outputs/demo", help="folder that holds sft/ and dpo/")
    outputs = Path(parser.parse_args().outputs)
    try:
        require_models(outputs)
        instructions = held_out(QUESTIONS)
        stages = [*STAGES, *([OWN] if has_model(outputs / OWN) else [])]
        answers = {stage: answer(outputs / stage, instructions) for stage in stages}
        report = compare(instructions, answers)
        for stage in stages:
            report[stage] |= preferences(outputs / stage)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    report["plots"] = [str(plot) for stage in stages for plot in sorted(outputs.glob(f"{stage}/plots/*.png"))]
    (outputs / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report, Console())
    return 0


def require_models(outputs: Path) -> None:
    """Raise UserError where a stage has not left a model."""
    for stage, command in STAGES.items():
        if not has_model(outputs / stage):
            raise UserError(f"There is no model in {outputs / stage / 'model'}. Make it with: {command}")


def has_model(folder: Path) -> bool:
    """Whether a run has left a model in `folder`."""
    return (folder / "model" / "config.json").exists()


def held_out(count: int) -> list[str]:
    """The first `count` different instructions of the test feedback; none of them occurs in training."""
    with Path(locate("demo:feedback-test.jsonl")).open(encoding="utf-8") as file:
        return [*dict.fromkeys(json.loads(line)["instruction"] for line in file)][:count]


def answer(folder: Path, instructions: list[str]) -> list[tuple[str, int]]:
    """Greedy answers of the stage's model, each with its length in tokens."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from zephyr.data.render import load_tokenizer
    from zephyr.generation.generate import generate

    disable_progress_bar()
    tokenizer = load_tokenizer(str(folder / "model"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    conversations = [[{"role": "user", "content": text}] for text in instructions]
    texts = generate(model, tokenizer, conversations, max_new_tokens=MAX_NEW_TOKENS)
    return [(text, len(tokenizer(text)["input_ids"])) for text in texts]


def compare(instructions: list[str], answers: dict[str, list[tuple[str, int]]]) -> dict[str, Any]:
    """The teacher's verdict on the stages' answers to the same instructions, SFT first; a tie is half a win over it."""
    scores = {
        stage: [score(text, said) for text, (said, _) in zip(instructions, given, strict=True)]
        for stage, given in answers.items()
    }
    report: dict[str, Any] = {"questions": len(instructions)}
    gains: list[float] = []
    for stage, given in answers.items():
        lengths = [tokens for _, tokens in given]
        report[stage] = {"score": sum(scores[stage]) / len(given), "tokens": sum(lengths) / len(given)}
        if stage != "sft":
            gains = [new - old for old, new in zip(scores["sft"], scores[stage], strict=True)]
            wins, ties = sum(gain > 0 for gain in gains), sum(gain == 0 for gain in gains)
            losses = len(gains) - wins - ties
            report[stage] |= {"wins": wins, "ties": ties, "losses": losses, "win_rate": (wins + ties / 2) / len(gains)}
    report["examples"] = [
        {
            "instruction": instructions[i],
            **{stage: {"answer": answers[stage][i][0], "score": scores[stage][i]} for stage in answers},
        }
        for i in _spread(gains, EXAMPLES)
    ]
    return report


def _spread(gains: list[float], count: int) -> list[int]:
    """Evenly spaced places in the order of gain, so that losses and ties are shown in their proportion."""
    order = sorted(range(len(gains)), key=lambda i: gains[i])
    return [order[(2 * k + 1) * len(order) // (2 * count)] for k in range(min(count, len(order)))]


def preferences(folder: Path) -> dict[str, float]:
    """The last validation's held-out accuracy and margin (nats times beta), empty where none was logged."""
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        return {}
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    names = ("accuracies", "margins")
    return {name: row[f"eval/rewards/{name}"] for row in rows for name in names if f"eval/rewards/{name}" in row}


def show(report: dict[str, Any], console: Console) -> None:
    """Print the examples, the table, and where the plots are."""
    stages = [stage for stage in NAMES if stage in report]
    for example in report["examples"]:
        console.print(Text(f"\n{example['instruction']}", style="bold"))
        for stage in stages:
            said = example[stage]
            console.print(Text(f"  {NAMES[stage]}  {said['answer']}  ({said['score']:.2f})"))

    table = Table(title=f"\n{report['questions']} held-out questions")
    table.add_column("")
    for stage in stages:
        table.add_column(NAMES[stage], justify="right")

    def row(title: str, form: str, first: int = 1) -> None:
        cells = [form.format(**report[stage]) if _has(report[stage], form) else "not measured" for stage in stages]
        table.add_row(title, *[""] * first, *cells[first:])

    row("teacher's score (1 to 5)", "{score:.3f}", first=0)
    row("answer length (tokens)", "{tokens:.1f}", first=0)
    row("win rate over SFT (ties half)", "{win_rate:.1%}")
    row("wins / ties / losses", "{wins} / {ties} / {losses}")
    row("preference accuracy (held-out pairs)", "{accuracies:.3f}")
    row("reward margin (held-out pairs)", "{margins:.3f}")
    console.print(table)
    for plot in report["plots"]:
        console.print(Text(f"plot: {plot}"))


def _has(values: dict[str, Any], form: str) -> bool:
    return all(name in values for _, name, _, _ in Formatter().parse(form) if name)


if __name__ == "__main__":
    sys.exit(main())
