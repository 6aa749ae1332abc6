"""What a run came to: counts, mean ratings, failures by cause, disagreement, tokens and cost. No text of a prompt."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zephyr.errors import UserError
from zephyr.feedback.client import Client
from zephyr.feedback.judge import ASPECTS
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.prompts import Prompts
from zephyr.feedback.record import Recorded, judged_twice
from zephyr.feedback.verdict import Judgements


class Account:
    """Sums over what became of prompts, one after the other."""

    def __init__(self) -> None:
        self.prompts = self.records = self.left = 0
        self.models: Counter[str] = Counter()  # completions with a text
        self.principles: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()  # records
        self.judges: Counter[str] = Counter()  # judgements, by the name that the server returned
        self.failures: dict[str, Counter[str]] = defaultdict(Counter)  # stage: cause
        self.examples: dict[str, str] = {}  # cause: detail of the first
        self.judged_twice = {aspect: Judgements() for aspect in ASPECTS}
        self._ratings: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0]))

    def add(self, source: str | None, recorded: Recorded | None) -> None:
        """A prompt; None where the budget did not reach."""
        self.prompts += 1
        if recorded is None:
            self.left += 1
            return
        for failure in recorded.failures:
            self.failures[failure["stage"]][failure["cause"]] += 1
            self.examples.setdefault(failure["cause"], failure["detail"])
        if recorded.row is None:
            return
        self.records += 1
        self.sources[recorded.row["source"]] += 1
        self.judges.update(judgement["judge"] for judgement in recorded.row["judgements"])
        for aspect, first, second in judged_twice(recorded.row):
            self.judged_twice[aspect].add(first, second)
        for one in recorded.row["completions"]:
            self.models[one["model"]] += 1
            self.principles[one["principle"]] += 1
            given = {aspect: one["annotations"].get(aspect, {}).get("Rating", "N/A") for aspect in ASPECTS}
            values = {aspect: float(rating) for aspect, rating in given.items() if rating != "N/A"}
            for name, value in {**values, "overall_score": one["overall_score"]}.items():
                if value is not None:
                    total = self._ratings[one["model"]][name]
                    total[0] += value
                    total[1] += 1

    def check(self, max_failures: float) -> None:
        """Raises UserError where there is no record, and no larger budget would make one; and where no record has a
        rating, unless every request may fail: completions alone may be what is wanted."""
        if self.records == 0 and self.left == 0:
            raise UserError(
                f"none of {self.prompts:,} prompts got two completions, so there is nothing to record: "
                f"{named(self.failures['generate'], self.examples)}. Mend that; what has been answered is kept."
            )
        if self.failures["judge"] and not self._ratings and self.left == 0 and max_failures < 1:
            raise UserError(
                f"no reply of the judge held a rating that can be read, for any of {self.prompts:,} prompts: "
                f"{named(self.failures['judge'], self.examples)}. Mend that; what has been answered is kept."
            )

    def report(
        self,
        config: dict[str, Any],  # without secrets
        prompts: Prompts,
        client: Client,
        ledger: Ledger,
        *,
        second: bool,  # whether there are two judgements
        seconds: float,
    ) -> dict[str, Any]:
        """All of it, as JSON values. `seconds` are those of this run."""
        tally = client.tally
        return {
            "stopped_by": "budget" if self.left else None,
            "prompts": self.prompts,
            "records": self.records,
            "too_few_completions": self.prompts - self.records - self.left,
            "prompts_left": self.left,
            "duplicate_prompts": prompts.duplicates,
            "bad_rows": {"number": prompts.bad, "first": prompts.named},
            "completions_by_model": _sorted(self.models),
            "completions_by_principle": _sorted(self.principles),
            "records_by_source": _sorted(self.sources),
            "judgements_by_judge": _sorted(self.judges),
            "mean_ratings": {
                model: {name: {"mean": total / number, "n": number} for name, (total, number) in sorted(given.items())}
                for model, given in sorted(self._ratings.items())
            },
            "failures": {stage: _sorted(causes) for stage, causes in sorted(self.failures.items())},
            "second_judgement": {
                aspect: judgements.disagreement()._asdict() for aspect, judgements in self.judged_twice.items()
            }
            if second
            else None,
            "this_run": {
                "seconds": round(seconds, 2),
                "requests_sent": tally.sent,
                "requests_replayed": tally.replayed,
                "requests_per_second": round(tally.sent / seconds, 2),
                "retries": _sorted(tally.retries),
                "prompt_tokens": tally.prompt_tokens,
                "completion_tokens": tally.completion_tokens,
                "cached_tokens": tally.cached_tokens,
                "cost": tally.cost,
                "cost_of_failed_attempts": tally.waste,  # at most
            },
            "ledger": [total._asdict() for total in ledger.totals()],
            "config": config,
        }

    def told(self, report: dict[str, Any], spent: str | None, output: Path) -> str:
        """The last words of a run. `spent` says what of the budget is."""
        run = report["this_run"]
        did = f"{run['requests_sent']:,} requests sent, {run['requests_replayed']:,} answers found in the ledger"
        spent_now = run["cost"] + run["cost_of_failed_attempts"]
        cost = f", {spent_now:.4f} USD" if spent_now else ""
        words = (
            f"{self.records:,} of {self.prompts:,} prompts recorded ({did}{cost}, {run['seconds']:,.0f} s): {output}"
        )
        if failed := sum(self.failures.values(), Counter()):
            common = ", ".join(f"{number:,} {cause}" for cause, number in failed.most_common(3))
            words += f"\n{failed.total():,} failures ({common}) are named in {output}/failures.jsonl."
        if self.left:
            words += f"\nStopped by the budget ({spent}): {self.left:,} prompts are left."
            words += " The same command with a larger one goes on."
        return words


def named(causes: Counter[str], examples: Mapping[str, str]) -> str:
    """The commonest causes, each with how often it was met and what was said then."""
    return "; ".join(f"{number:,} {cause} ({examples[cause]})" for cause, number in causes.most_common(3) if number)


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))
