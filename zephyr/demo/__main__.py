"""What the demo's preferences changed: `python -m zephyr.demo [OUTPUTS]`, after both stages have run."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from zephyr.demo import locate
from zephyr.demo.teacher import score
from zephyr.errors import UserError

STAGES = {"sft": "python train.py", "dpo": "python train.py stage=dpo"}
QUESTIONS, EXAMPLES, MAX_NEW_TOKENS = 200, 6, 64


def main() -> int:
    """Compare the stages' models, write `OUTPUTS/report.json`, print it; the result is the exit status."""
    parser = argparse.ArgumentParser(prog="python -m zephyr.demo", description=__doc__)
    parser.add_argument("outputs", nargs="?", default="outputs/demo", help="folder that holds sft/ and dpo/")
    outputs = Path(parser.parse_args().outputs)
    try:
        require_models(outputs)
        instructions = held_out(QUESTIONS)
        answers = {stage: answer(outputs / stage, instructions) for stage in STAGES}
        report = compare(instructions, answers) | preferences(outputs / "dpo")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    report["plots"] = [str(plot) for stage in STAGES for plot in sorted(outputs.glob(f"{stage}/plots/*.png"))]
    (outputs / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report, Console())
    return 0


def require_models(outputs: Path) -> None:
    """Raise UserError where a stage has not left a model."""
    for stage, command in STAGES.items():
        if not (outputs / stage / "model" / "config.json").exists():
            raise UserError(f"There is no model in {outputs / stage / 'model'}. Make it with: {command}")


def held_out(count: int) -> list[str]:
    """The first `count` different instructions of the test feedback; none of them occurs in training."""
    with Path(locate("demo:feedback-test.jsonl")).open(encoding="utf-8") as file:
        return [*dict.fromkeys(json.loads(line)["instruction"] for line in file)][:count]


def answer(folder: Path, instructions: list[str]) -> list[tuple[str, int]]:
    """Greedy answers of the stage's model, each with its length in tokens."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from zephyr.data.render import load_tokenizer
    from zephyr.generate import generate

    disable_progress_bar()
    tokenizer = load_tokenizer(str(folder / "model"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    conversations = [[{"role": "user", "content": text}] for text in instructions]
    texts = generate(model, tokenizer, conversations, max_new_tokens=MAX_NEW_TOKENS)
    return [(text, len(tokenizer(text)["input_ids"])) for text in texts]


def compare(instructions: list[str], answers: dict[str, list[tuple[str, int]]]) -> dict[str, Any]:
    """The teacher's verdict on both stages' answers to the same instructions; a tie is half a win."""
    report: dict[str, Any] = {"questions": len(instructions)}
    scores = {}
    for stage, given in answers.items():
        scores[stage] = [score(text, said) for text, (said, _) in zip(instructions, given, strict=True)]
        report[f"{stage}_score"] = sum(scores[stage]) / len(instructions)
        report[f"{stage}_tokens"] = sum(tokens for _, tokens in given) / len(instructions)
    gains = [dpo - sft for sft, dpo in zip(scores["sft"], scores["dpo"], strict=True)]
    report["wins"], report["ties"] = sum(gain > 0 for gain in gains), sum(gain == 0 for gain in gains)
    report["losses"] = len(gains) - report["wins"] - report["ties"]
    report["win_rate"] = (report["wins"] + report["ties"] / 2) / len(gains)
    report["examples"] = [
        {
            "instruction": instructions[i],
            **{stage: answers[stage][i][0] for stage in STAGES},
            **{f"{stage}_score": scores[stage][i] for stage in STAGES},
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
    for example in report["examples"]:
        console.print(Text(f"\n{example['instruction']}", style="bold"))
        for stage in STAGES:
            console.print(Text(f"  {stage.upper()}  {example[stage]}  ({example[f'{stage}_score']:.2f})"))

    def number(name: str) -> str:
        return f"{report[name]:.3f}" if name in report else "not measured"

    table = Table(title=f"\n{report['questions']} held-out questions")
    for heading in ("", "SFT", "DPO"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("teacher's score (1 to 5)", number("sft_score"), number("dpo_score"))
    table.add_row("answer length (tokens)", f"{report['sft_tokens']:.1f}", f"{report['dpo_tokens']:.1f}")
    table.add_row("win rate over SFT (ties half)", "", f"{report['win_rate']:.1%}")
    table.add_row("wins / ties / losses", "", f"{report['wins']} / {report['ties']} / {report['losses']}")
    table.add_row("preference accuracy (held-out pairs)", "", number("accuracies"))
    table.add_row("reward margin (held-out pairs)", "", number("margins"))
    console.print(table)
    for plot in report["plots"]:
        console.print(Text(f"plot: {plot}"))


if __name__ == "__main__":
    sys.exit(main())
