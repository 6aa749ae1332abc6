"""The paper's ablation (Tunstall et al., 2023, table 3) and its study of epochs (figure 3), made for any recipe."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zephyr.errors import UserError, check_writable
from zephyr.settings import parse as parse_run
from zephyr.study import judging
from zephyr.study.plan import Run, chats, plan, wanted
from zephyr.study.report import write
from zephyr.study.results import results
from zephyr.study.settings import Ablation, parse
from zephyr.study.training import Compose, make, say, write_chosen


def run(config: dict[str, Any], compose: Compose) -> int:
    """Train what is missing, judge it, and write report.md, its pictures and results.json; 1 if a run failed.

    `compose` gives the configuration that train.py makes of a list of overrides. Raises UserError at a mistake in the
    settings or in the recipe's, before the first run begins.
    """
    settings = parse(config)
    started = time.monotonic()
    dpo = compose([f"recipe={settings.recipe}", "stage=dpo", *wanted(settings, "dpo")])
    runs = plan(settings, dpo)
    for each in runs:
        if each.seed == settings.seeds[0]:
            parse_run(compose(each.overrides))
    if settings.dry_run:
        print(*(shlex.join(["python", "train.py", *each.overrides]) for each in runs), sep="\n")
        return 0
    output = Path(settings.output)
    check_writable(output, "output")
    write_chosen(chats(output), dpo["data"], settings.seeds[0])
    failed = make(runs, compose)
    marks, unjudged = _judge([each for each in runs if each.name not in failed], settings)
    found = results(settings, runs, marks, failed | unjudged)
    written = write(found, output, time.monotonic() - started)
    print((output / "report.md").read_text(encoding="utf-8"))
    say(f"Report: {', '.join(map(str, written))}.")
    return 1 if failed or unjudged else 0


def _judge(runs: Sequence[Run], settings: Ablation) -> tuple[dict[str, judging.Marks], dict[str, str]]:
    """The marks of each run by name, and the runs that got none, with the reason."""
    marks: dict[str, judging.Marks] = {}
    failed: dict[str, str] = {}
    for each in runs:
        try:
            if settings.recipe == "demo":
                marks[each.name] = judging.by_teacher(each, settings.questions)
            else:
                marks[each.name] = judging.by_benchmarks(each, settings)
        except UserError as error:
            failed[each.name] = str(error)
            say(f"{each.name}: {error}")
        else:
            say(f"{each.name}: " + ", ".join(f"{name} {value:.2f}" for name, value in marks[each.name].values.items()))
    return marks, failed
