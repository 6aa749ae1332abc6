"""`python -m zephyr.prepare`, as a user runs it: small files in, the published layouts and exact accounts out."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from zephyr.data import sources
from zephyr.data.truecase.casing import Table
from zephyr.prepare import ultrachat, ultrafeedback

ROOT = Path(__file__).parents[1]
ANSWER = "Water boils at one hundred degrees, and it does so sooner on a mountain."


def prepare(command: str, *overrides: str, check: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "zephyr.prepare", command, *overrides], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == check, done.stderr
    assert "Traceback" not in done.stderr
    return done


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def dialogue(prompt: str, answer: str = ANSWER, *more: str) -> dict[str, Any]:
    texts = [prompt, answer, *more]
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def table(folder: Path, split: str) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob(f"data/{split}-*.parquet")) for row in pq.read_table(path).to_pylist()]


SUBJECTS = ("water", "iron", "gold", "sugar", "salt", "copper", "milk", "honey", "wax", "glass", "tin", "oil")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Twelve dialogues that stay, and one for each rule, once through the command."""
    folder = tmp_path_factory.mktemp("chats")
    kept = [dialogue(f"At which temperature does {what} melt or boil, and why is that so?") for what in SUBJECTS]
    kept[3] = dialogue(
        "when does sugar melt? i need to know it today.", ANSWER, "and in march, at my mother's?", ANSWER
    )
    raw = {"id": "0", "data": ["Is a raw row of two strings read as well as the others are?", ANSWER]}
    left_out = [
        dialogue("How do you feel about melting gold in a kitchen?", "As I said, I do not have emotions. " + ANSWER),
        dialogue("What is the most useful thing to know of boiling?", " \n"),
        {"messages": [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": "Why?"}]},
        dialogue("Warum kocht das Wasser auf dem Berg früher als im Tal, und was hat der Druck damit zu tun?",
                 "Weil der Luftdruck auf dem Berg kleiner ist als im Tal, kocht das Wasser dort schon früher."),
        dialogue("Which three colours has the flag of the imaginary republic of Melting, and what do they mean?"),
        dialogue("At which temperature does gold melt or boil,  and why is that SO?!"),
    ]  # fmt: skip
    bad = ['{"messages": [', {"messages": "none"}]
    evaluation = written(folder / "evaluation.jsonl", [{"turns": [
        "Which three colours has the flag of the imaginary republic of Melting, and what do they stand for?"]}])  # fmt: skip
    source = written(folder / "raw.jsonl", [*kept, raw, *left_out, *bad])
    output = folder / "clean"
    prepare(
        "ultrachat", f"input={source}", f"output={output}", f"decontaminate.files=[{evaluation}]", "splits.test_sft=4"
    )
    return output, json.loads((output / "report.json").read_text())


def test_every_row_is_accounted_for(chats: tuple[Path, dict[str, Any]]) -> None:
    _, report = chats
    dropped = {rule: count for rule, count in report["dropped"].items() if count}
    assert dropped == {
        "refusal": 1, "empty": 1, "alternation": 1, "language": 1, "contamination": 1, "near_duplicate": 1
    }  # fmt: skip
    assert (report["rows_in"], report["rows_out"], report["bad_rows"]) == (21, 13, 2)


def test_bad_rows_are_named_with_what_is_wrong(chats: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = chats
    rows = [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in rows] == [("raw.jsonl", 20), ("raw.jsonl", 21)]
    assert "invalid JSON" in rows[0]["why"] and "messages is str, not a list" in " ".join(map(str, rows[1].values()))


def test_the_layout_is_that_of_the_published_data_set(chats: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = chats
    splits = {name: table(folder, name) for name in ("train_sft", "test_sft", "train_gen", "test_gen")}
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train_sft": 9, "test_sft": 4, "train_gen": 9, "test_gen": 4
    }  # fmt: skip
    for name, rows in splits.items():
        for row in rows:
            assert row["prompt"] == row["messages"][0]["content"]
            assert row["prompt_id"] == hashlib.sha256(row["prompt"].encode()).hexdigest()
            assert row["messages"][-1]["role"] == ("user" if name.endswith("gen") else "assistant")
    train, test = ({row["prompt"] for name in names for row in splits[name]} for names in (
        ("train_sft", "train_gen"), ("test_sft", "test_gen")))  # fmt: skip
    assert not train & test


def test_lost_capitals_are_mended_and_counted(chats: tuple[Path, dict[str, Any]]) -> None:
    folder, report = chats
    rows = [*table(folder, "train_sft"), *table(folder, "test_sft")]
    (mended,) = [row for row in rows if "sugar" in row["prompt"]]
    assert mended["prompt"] == "When does sugar melt? I need to know it today."
    assert mended["messages"][2]["content"].startswith("And in ")
    assert report["counts"]["truecased/user"] == 2 and "truecased/assistant" not in report["counts"]


def test_training_reads_a_split_by_name(chats: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = chats
    rows = [sources.conversation(row) for row in sources.read(sources.files(f"{folder}:train_sft", "data.train"))]
    assert len(rows) == 9


def test_a_result_is_not_made_twice_nor_written_over(chats: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = chats
    source = folder.parent / "raw.jsonl"
    evaluation = folder.parent / "evaluation.jsonl"
    same = [f"input={source}", f"output={folder}", f"decontaminate.files=[{evaluation}]", "splits.test_sft=4"]
    assert "already there" in prepare("ultrachat", *same).stdout
    assert str(folder) in prepare("ultrachat", *same, "seed=1", check=2).stderr


def test_each_filter_has_an_off_switch(chats: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = chats
    off = [
        "filters.alternation=false", "filters.empty=false", "filters.min_messages=null", "filters.broken=false",
        "filters.max_dialogue_characters=null", "filters.refusals=[]", "filters.personas=[]", "filters.openings=[]",
        "filters.languages=[]", "near_duplicates=null", "truecase=null",
    ]  # fmt: skip
    prepare("ultrachat", f"input={folder.parent / 'raw.jsonl'}", f"output={tmp_path / 'all'}", *off)
    report = json.loads((tmp_path / "all" / "report.json").read_text())
    assert (report["rows_out"], report["bad_rows"]) == (19, 2)
    assert not any(name.startswith("truecased") for name in report["counts"])


def completion(text: str, *ratings: str, overall: float = 7) -> dict[str, Any]:
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    return {
        "model": "m", "response": text, "overall_score": overall,
        "annotations": {name: {"Rating": rating} for name, rating in zip(aspects, ratings, strict=False)},
    }  # fmt: skip


def test_feedback_becomes_pairs(tmp_path: Path) -> None:
    rows = [
        {"source": "x", "instruction": f"Question {n}?", "models": ["m"] * 3, "completions": [
            completion("good", "5", "5", "N/A", "5"), completion("bad", "1", "2", "1", "1"), completion(" ", "5")]}
        for n in range(8)
    ]  # fmt: skip
    rows.append({**rows[0], "source": "truthful_qa"})
    source = written(tmp_path / "raw.jsonl", [*rows, {"instruction": "?", "completions": 3}])
    output = tmp_path / "pairs"
    sizes = ["splits.test_prefs=2", "splits.test_sft=1", "splits.test_gen=1"]
    prepare("ultrafeedback", f"input={source}", f"output={output}", *sizes)
    report = json.loads((output / "report.json").read_text())
    assert (report["rows_in"], report["rows_out"], report["bad_rows"]) == (10, 8, 1)
    assert report["dropped"]["truthful_qa"] == 1
    assert report["counts"]["fault/not_applicable"] == 8 and report["counts"]["fault/empty_response"] == 8
    assert {name: report["splits"][name] for name in report["splits"]} == {
        "train_prefs": 6, "test_prefs": 2, "train_sft": 6, "test_sft": 1, "train_gen": 6, "test_gen": 1
    }  # fmt: skip
    for row in table(output, "train_prefs"):
        assert row["chosen"] == row["messages"] and row["chosen"][-1]["content"] == "good"
        assert row["rejected"][-1]["content"] == "bad"
        assert (row["score_chosen"], row["score_rejected"]) == (5.0, 1.25)
    read = [sources.preference(row, 0) for row in sources.read(sources.files(f"{output}:train_prefs", "data.train"))]
    assert len(read) == 6 and None not in read


def test_a_table_counted_on_own_text_is_used(tmp_path: Path) -> None:
    text = "At noon we met our friend Zorblat near the bridge, where everyone had been waiting since the morning."
    source = written(tmp_path / "text.jsonl", [{"text": text + f" It was day {n}."} for n in range(50)])
    prepare("truecaser", f"input={source}", f"output={tmp_path / 'alone.gz'}", "onto=null")
    prepare("truecaser", f"input={source}", f"output={tmp_path / 'table.gz'}", f"onto={tmp_path / 'alone.gz'}")
    one, two = (Table.load(tmp_path / name) for name in ("alone.gz", "table.gz"))
    assert (one.forms["Zorblat"], two.forms["Zorblat"], "London" in two.forms) == (50, 100, False)
    prepare("truecaser", f"input={source}", f"output={tmp_path / 'default.gz'}")
    three = Table.load(tmp_path / "default.gz")
    assert three.forms["Zorblat"] == 50 and "London" in three.forms
    chat = written(tmp_path / "chat.jsonl", [dialogue("we met zorblat at noon. did everyone like zorblat?")])
    options = [f"truecase={tmp_path / 'table.gz'}", "splits.test_sft=0", "near_duplicates=null"]
    prepare("ultrachat", f"input={chat}", f"output={tmp_path / 'out'}", *options)
    (row,) = table(tmp_path / "out", "train_sft")
    assert row["prompt"] == "We met Zorblat at noon. Did everyone like Zorblat?"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "input is not set: give input=VALUE"),
        (["input=a.jsonl", "outptu=b"], "no key 'outptu'. Did you mean 'output'?"),
        (["input=/nowhere.jsonl", "output=b"], "does not exist"),
        (["input=a.jsonl", "output=b", "splits.test_sft=-1"], "splits.test_sft must be a share in (0, 1) or a whole"),
        (["input=a.jsonl", "output=b", "filters.languages=[klingon]"], "klingon"),
        (["input=a.jsonl", "output=b", "bad_rows=ignore"], "bad_rows must be one of error, drop"),
    ],
)
def test_mistakes_end_with_one_message(arguments: list[str], said: str) -> None:
    done = prepare("ultrachat", *arguments, check=2)
    assert said in done.stderr and done.stderr.startswith("Error: ") and len(done.stderr.splitlines()) == 1


def test_every_rule_of_a_work_is_documented() -> None:
    """What a report may name stands in the documentation."""
    text = (ROOT / "docs" / "data.md").read_text()
    rules = {*ultrachat.UltraChat.rules, *ultrafeedback.UltraFeedback.rules, "near_duplicate"}
    assert not {rule for rule in rules if f"`{rule}`" not in text}


def test_help_prints_every_key_with_its_default() -> None:
    for command in ("ultrachat", "ultrafeedback", "truecaser"):
        assert prepare(command, "--help").stdout == (ROOT / "conf" / "prepare" / f"{command}.yaml").read_text() + "\n"
