"""The report of several models: its content in both forms, what is broken, and how a browser shows the page."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from zephyr.errors import UserError
from zephyr.evaluation import report as module
from zephyr.evaluation.charts import inlined
from zephyr.evaluation.files import file_name
from zephyr.evaluation.report import report

ATTACK = "</p><script>document.title = 'taken over'</script><img src=http://example.com/x onerror=alert(1)> `` ```"
CATEGORIES = ("writing", "roleplay", "reasoning", "math")


def part(score: float | None, n: int = 8) -> dict[str, Any]:
    interval = None if score is None else [score - 0.3, score + 0.2]
    return {"score": score, "interval": interval, "n": n, "failed": 0, "no_reply": 0}


def model(folder: Path, name: str, shift: float = 0.0) -> Path:
    """What python -m zephyr.evaluate leaves of all four benchmarks."""
    turns = {"1": part(7.5 + shift), "2": part(6.5 + shift)}
    by_category = {category: part(5.0 + place + shift) for place, category in enumerate(CATEGORIES)}
    by_category["math"] = part(None, 0)
    put(folder / "mt_bench", {
        "benchmark": "mt_bench", "model": name, "mode": "single", "judge": "gpt-4", **part(7.0 + shift, 16), "failed": 2,
        "unanswered": 1, "turns": turns, "categories": by_category,
    })  # fmt: skip
    questions, answers, judgments = [], [], []
    for place, category in enumerate(CATEGORIES):
        questions.append({"question_id": 81 + place, "category": category, "turns": [f"Ask {place} <b>", "More?"]})
        said = [f"{name} says {place}", ATTACK if place == 0 else "more"]
        answers.append({"question_id": 81 + place, "model_id": name, "choices": [{"index": 0, "turns": said}]})
        judgments.append({"question_id": 81 + place, "model": name, "score": 9 - place, "turn": 1})
    lines(folder / "mt_bench" / "question.jsonl", questions)
    lines(folder / "mt_bench" / "model_answer" / f"{file_name(name)}.jsonl", answers)
    rival = [{**answer, "choices": [{"index": 0, "turns": ["of a rival"]}]} for answer in answers]
    lines(folder / "mt_bench" / "model_answer" / "~rival.jsonl", rival)
    lines(folder / "mt_bench" / "model_judgment" / "gpt-4_single.jsonl", judgments)

    put(folder / "alpaca_eval", {
        "benchmark": "alpaca_eval", "model": name, "baseline": "text_davinci_003", "annotator": "gpt4",
        "win_rate": 71.25 + shift, "standard_error": 1.5, "n": 805, "n_wins": 570, "n_wins_base": 230, "n_draws": 5,
        "discrete_win_rate": 71.0, "win_rate_low": 68.0, "win_rate_high": 74.0, "avg_length": 1203.6,
        "avg_length_baseline": 400.0, "failed": 3, "length_controlled_winrate": None, "lc_standard_error": None,
    })  # fmt: skip
    rows = [{"instruction": f"Do {i}", "output_1": "base", "output_2": f"{name} did {i}", "preference": 2.0 - 0.5 * i,
             "generator_1": "text_davinci_003", "generator_2": name} for i in range(3)]  # fmt: skip
    (folder / "alpaca_eval" / "annotations.json").write_text(json.dumps(rows))

    def task(title: str | None, score: float, published: float | None) -> dict[str, Any]:
        return {"title": title, "metric": "acc_norm,none", "shots": 25, "score": score, "stderr": 1.25,
                "mean_of_parts": None, "published": published, "source": published and "a table", "n": 10, "metrics": {}}  # fmt: skip

    scores = {"arc_challenge": task("ARC", 55.5 + shift, 62.03), "own_task": task(None, 40.0, None)}
    put(folder / "leaderboard", {
        "benchmark": "leaderboard", "model": name, "scores": scores, "average": 55.5 + shift, "published_average": 62.03,
    })  # fmt: skip
    group = {"n": 100, "accuracy": 0.75, "low": 0.66, "high": 0.83, "margin": -0.5}
    bins = [{"start": 0.5, "end": 0.55, "n": 60, "confidence": 0.52, "accuracy": 0.6},
            {"start": 0.55, "end": 0.6, "n": 40, "confidence": 0.58, "accuracy": 0.9},
            {"start": 0.6, "end": 0.65, "n": 0, "confidence": None, "accuracy": None}]  # fmt: skip
    put(folder / "preferences", {
        "benchmark": "preferences", "model": name, "data": "pairs.jsonl", "score": "reward", "reference": "base",
        "beta": 0.1, **group, "longer_preferred": 0.6, "by_source": {"flan": group},
        "by_length_difference": [{"from": -9, "to": 3, **group}, {"from": 4, "to": 90, **group}],
        "by_prompt_length": [{"from": 1, "to": 9, **group}], "calibration": bins, "expected_calibration_error": 0.05,
        "failed": 0, "dropped": {},
    })  # fmt: skip
    return folder


def put(folder: Path, results: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two models, one of them under a hostile name."""
    folder = tmp_path_factory.mktemp("report")
    model(folder / "one" / "evaluation", "tiny-dpo")
    model(folder / "two", "<script>x</script>|$a$", shift=-0.5)
    assert report([folder / "one", folder / "two"], folder / "out") == []
    return folder / "out"


def cells(page: str, title: str) -> list[list[str]]:
    """The texts of the table with this caption, its heading first."""
    (table,) = re.findall(rf"<table>\s*<caption>{re.escape(title)}</caption>(.*?)</table>", page, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [
        [
            html.unescape(re.sub(r"<[^>]*>", "", cell))
            for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        ]
        for row in rows
    ]


HOSTILE = "<script>x</script>|$a$"


def test_the_tables_hold_the_results(made: Path) -> None:
    page = (made / "report.html").read_text()
    assert cells(page, "Scores") == [
        ["Model", "MT-Bench", "AlpacaEval, % won", "Open LLM Leaderboard, % mean", "Preference accuracy, %"],
        ["tiny-dpo", "7.00 6.70 to 7.20", "71.25 68.00 to 74.00", "55.50", "75.00 66.00 to 83.00"],
        [HOSTILE, "6.50 6.20 to 6.70", "70.75 68.00 to 74.00", "55.00", "75.00 66.00 to 83.00"],
    ]
    assert cells(page, "Scores, 1 to 10")[1] == [
        "tiny-dpo", "7.00 6.70 to 7.20", "7.50 7.20 to 7.70", "6.50 6.20 to 6.70", "gpt-4", "16", "3",
    ]  # fmt: skip
    assert [row[-1] for row in cells(page, "Scores, 1 to 10, by category")] == ["math", "–", "–"]
    assert cells(page, "Tasks") == [
        ["Task", "Metric", "Shots", "Zephyr-7B-beta, published", "tiny-dpo", HOSTILE],
        ["ARC", "acc_norm", "25", "62.03", "55.50 ± 1.25", "55.00 ± 1.25"],
        ["own_task", "acc_norm", "25", "–", "40.00 ± 1.25", "40.00 ± 1.25"],
        ["Mean", "", "", "62.03", "55.50", "55.00"],
    ]
    rates = cells(page, "Win rates")[1]
    assert rates[1:] == ["71.25 68.00 to 74.00", "1.50", "71.00", "805", "3", "1,204", "text_davinci_003", "gpt4"]
    assert cells(page, "Pairs in the right order")[1][4:6] == ["\N{MINUS SIGN}0.500", "0.050"]
    assert cells(page, "By tokens that the chosen answer has more, %")[0] == ["Model", "-9 to 3", "4 to 90"]


def test_markdown_says_the_same_and_has_its_plots(made: Path) -> None:
    text = (made / "report.md").read_text()
    assert "| ARC | acc\\_norm | 25 | 62.03 | 55.50 (± 1.25) | 55.00 (± 1.25) |" in text
    assert "| ---: |" in text and "&lt;script&gt;x&lt;/script&gt;\\|\\$a\\$" in text
    named = set(re.findall(r"\]\((\S+\.png)\)", text))
    assert named == {path.name for path in made.glob("*.png")} and len(named) == 6
    assert f"````text\n{ATTACK}\n````" in text  # a fence longer than the answer's
    assert "<script" not in re.sub(r"^(```+)text\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)


class Tags(HTMLParser):
    """Every tag of a page, with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_asks_for_nothing_and_text_is_text(made: Path) -> None:
    page = (made / "report.html").read_text()
    tags = Tags(page).found
    names = [name for name, _ in tags]
    assert not {"img", "link", "iframe", "object", "base", "form"} & {*names} and names.count("script") == 1
    for name, attributes in tags:
        fetched = {"src", "srcset", "action", "data", "poster", "background"} & {*attributes}
        assert not fetched and not any(key.startswith("on") for key in attributes), name
        assert all(attributes.get(link, "#").startswith("#") for link in ("href", "xlink:href")), name
    styles = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in styles and "@import" not in styles
    assert "default-src 'none'" in page
    assert names.count("svg") == 6 == sum(bool(a.get("aria-label")) for _, a in tags if a.get("role") == "img")
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(attributes.get("scope") in ("col", "row") for name, attributes in tags if name == "th")
    assert "of a rival" not in page
    assert page.index("judged 9") < page.index("Question 82") and "judged better" in page and "a draw" in page


def test_equal_results_give_equal_bytes(made: Path, tmp_path: Path) -> None:
    report([made.parent / "one", made.parent / "two"], tmp_path)
    assert {path.name for path in made.iterdir()} == {path.name for path in tmp_path.iterdir()}
    for path in made.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_what_is_missing_or_broken_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = model(tmp_path / "whole", "same")
    for name in ("leaderboard", "preferences"):
        shutil.rmtree(whole / name)
    other = model(tmp_path / "other", "same")
    (other / "mt_bench" / "results.json").write_text('{"model": "same", "mode": "single"}')
    (other / "alpaca_eval" / "results.json").write_text('{"model": "same", "win_rate": NaN}')
    (other / "leaderboard" / "results.json").write_text("[")
    (other / "alpaca_eval" / "annotations.json").write_bytes(b"\xff")
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments = [str(folder) for folder in (whole, other, empty)] + [f"output={tmp_path / 'out'}"]
    assert module.main(arguments) == 0
    said = capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    for broken in (empty, *(other / name / "results.json" for name in ("mt_bench", "alpaca_eval", "leaderboard"))):
        assert f"Left out: {broken}: " in said and f"<li>{broken}: " in page
    labels = [row[0] for row in cells(page, "Scores")]
    assert labels == ["Model", f"same ({whole})", f"same ({other})"]
    assert "Open LLM" not in page and "Preference accuracy" in page
    with pytest.raises(UserError, match="no results"):
        report([empty], tmp_path / "none")
    with pytest.raises(UserError, match=r"There is no folder .*absent"):
        report([tmp_path / "absent"], tmp_path / "none")
    with pytest.raises(UserError, match=r"report DIR\.\.\."):
        report([], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_half_a_character_and_a_pair_mode(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "m")
    for name in ("leaderboard", "preferences"):
        shutil.rmtree(folder / name)
    results = json.loads((folder / "mt_bench" / "results.json").read_text())
    results |= {"mode": "pair", "baseline": "rival", "score": 0.6, "interval": [0.5, 0.7]}
    (folder / "mt_bench" / "results.json").write_text(json.dumps(results))
    rows = [{"instruction": "\ud800", "output_1": "b", "output_2": "\ud83d", "preference": None}]
    (folder / "alpaca_eval" / "annotations.json").write_text(json.dumps(rows))
    assert report([folder], tmp_path / "out") == []
    page = (tmp_path / "out" / "report.html").read_text()
    assert cells(page, "Wins, and half of the ties")[1][:3] == ["m", "rival", "0.60 0.50 to 0.70"]
    assert cells(page, "Scores")[0][1] == "MT-Bench, share won"  # not beside scores from 1 to 10
    assert "not judged" in page


def test_a_plot_takes_the_pages_colours() -> None:
    drawn = (
        '<?xml?><svg viewBox="0 0 1 1" width="9"><metadata>x</metadata><g id="text_1" style="fill: #24292F">t</g></svg>'
    )
    assert inlined(drawn) == '<svg viewBox="0 0 1 1" aria-hidden="true"><g style="fill: currentColor">t</g></svg>'


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FRAME = """<!doctype html><title>measuring</title><body style="margin:0">
<iframe id="page" style="width:WIDTHpx;height:900px;border:0"></iframe><pre id="found"></pre>
<script>
const frame = document.getElementById("page");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const first = () => page.querySelector("tbody th").textContent;
  const found = {wide: root.scrollWidth, inside: root.clientWidth, title: page.title, before: first()};
  found.cells = [...page.querySelectorAll("th, td")].map(cell => cell.textContent.trim());
  found.cut = [...page.querySelectorAll("body *")].filter(
    e => !e.closest(".wide, svg") && e.getBoundingClientRect().right > root.clientWidth + 1).length;
  const button = page.querySelectorAll("thead button")[1];
  button.click(); button.click();
  found.after = first();
  found.sorted = button.parentElement.getAttribute("aria-sort");
  document.getElementById("found").textContent = JSON.stringify(found);
};
frame.srcdoc = SOURCE;
</script>"""


def browse(folder: Path, file: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        "--enable-logging=stderr", "--hide-scrollbars", "--virtual-time-budget=3000", f"--user-data-dir={folder / 'profile'}", *flags,
        file.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to show the page")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it(made: Path, tmp_path: Path, width: int) -> None:
    page = (made / "report.html").read_text()
    source = json.dumps(page).replace("<", "\\u003c")
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)).replace("SOURCE", source))
    log = tmp_path / "net.json"
    done = browse(tmp_path, tmp_path / "frame.html", "--dump-dom", f"--log-net-log={log}", "--window-size=1400,900")
    (dumped,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    found = json.loads(html.unescape(dumped))
    assert found["title"] == "Evaluation"  # what the answer's script would have changed
    assert (found["inside"], found["wide"], found["cut"]) == (width, width, 0)
    assert {"tiny-dpo", HOSTILE, "62.03", "55.50 ± 1.25", "7.00 6.70 to 7.20"} <= set(found["cells"])
    assert (found["before"], found["after"], found["sorted"]) == ("tiny-dpo", HOSTILE, "ascending")
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    assert "example.com" not in log.read_text()
