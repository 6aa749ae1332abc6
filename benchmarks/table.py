"""Markdown tables of result files: python -m benchmarks.table benchmarks/results/*.json"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def rows(header: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A Markdown table whose first column is text and the rest figures."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *map(list, body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cpu_table(result: dict[str, Any]) -> str:
    """Ratios and rates of benchmarks.cpu."""
    sorted_too = bool(result["ratios_sorted"])
    header = ["case", "TRL at its best / Zephyr", "spread", "TRL's defaults"] + ["TRL, sorted"] * sorted_too
    header += ["tokens/CPU s", "TRL best", "TRL", "MFU", "MFU of TRL best"]
    body = []
    for case, ratio in result["ratios"].items():
        spread = result["spread"]["ratios"][case]
        figures = result["cases"].get(case, {})
        line = [case, f"**{ratio:.2f}**", f"{spread['min']:.2f} to {spread['max']:.2f}"]
        line.append(f"{result['ratios_default'][case]:.2f}")
        if sorted_too:
            line.append(_number(result["ratios_sorted"].get(case), ".2f"))
        line += [
            _number(figures.get(n, {}).get("tokens_per_cpu_second"), ",.0f") for n in ("zephyr", "trl_best", "trl")
        ]
        line += [_number(figures.get(n, {}).get("mfu"), ".0%") for n in ("zephyr", "trl_best")]
        body.append(line)
    return rows(header, body)


def gpu_table(result: dict[str, Any]) -> str:
    """Rates, memory and utilisation of benchmarks.gpu."""
    header = [
        "case",
        "held as",
        "tokens/s",
        "packed tokens/s",
        "examples/s",
        "s a step",
        "peak GiB",
        "MFU",
        "of product",
    ]
    body = []
    for case, contenders in result["cases"].items():
        for contender, f in contenders.items():
            name = case if contender == "zephyr" else f"{case}, {contender}"
            if "skipped" in f:
                body.append([name, f"left out: {f['skipped'][:100]}", *[""] * 7])
                continue
            held = f"{f['precision']}, {f['optimizer']}, {f['checkpointing']}"
            if contender != "zephyr":
                peer = "ms-swift" if contender == "ms_swift" else "TRL"
                held = peer if f["pieces"] == 1 else f"{peer}, a step in {f['pieces']} pieces"
            forms = {"tokens_per_second": ",.0f", "packed_tokens_per_second": ",.0f", "examples_per_second": ".1f"}
            forms |= {"seconds_a_step": ".3f", "peak_memory_gib": ".1f", "mfu": ".0%", "of_product": ".0%"}
            body.append([name, held, *(_number(f[key], form) for key, form in forms.items())])
    return rows(header, body)


def growth_table(result: dict[str, Any]) -> str:
    """What benchmarks.growth found, beside its bounds."""
    time, memory, steps = result["time"], result["memory"], result["steps"]
    costs, mib = time["cpu_microseconds_a_token"], memory["mib"]
    body = [[f"CPU microseconds a token, {int(n):,} tokens a step", f"{cost:.1f}", ""] for n, cost in costs.items()]
    body.append(["largest of smallest", f"{time['largest_of_smallest']:.2f}", f"{time['allowed']:.2f}"])
    body += [[f"MiB of activations, vocabulary {int(v):,}", f"{value:.0f}", ""] for v, value in mib.items()]
    body.append(["large of small", f"{memory['large_of_small']:.2f}", f"{memory['allowed']:.2f}"])
    first, last = steps["at"]
    between = f"from step {first['step']} to {last['step']}, {steps['lengths']} lengths of pairs"
    body.append([f"MiB of growth {between}", f"{steps['growth_mib']:.1f}", f"{steps['allowed_mib']:.0f}"])
    body.append([f"graphs compiled {between}", str(steps["new_graphs"]), "0"])
    return rows(["measured", "value", "bound"], body)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main(paths: list[str]) -> None:
    """Print the table of each file."""
    for path in paths:
        result = json.loads(Path(path).read_text())
        if not {"ratios", "attention_apart", "memory"} & set(result):
            continue  # no training steps: its figures are in the docs
        about = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        table = cpu_table if "ratios" in result else gpu_table if "attention_apart" in result else growth_table
        device = result["machine"].get("gpu", {}).get("name", result["machine"]["cpu"])
        print(f"`{path}`: {device}; {about}\n\n{table(result)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
