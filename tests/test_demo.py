"""The embedded demo: the split, the layouts, the teacher's verdicts by hand, the files in the cache."""

import io
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from zephyr.demo import __main__ as report
from zephyr.demo import locate, teacher, world, writers
from zephyr.demo.base import train_tokenizer
from zephyr.demo.examination import CATEGORIES
from zephyr.errors import UserError
from zephyr.evaluation.mt_bench import read_questions

JOB = world.FACTS["Mara"]["job"]
WRONG_JOB = world.FACTS["Otto"]["job"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        names = ["base", "chats-train.jsonl", "chats-test.jsonl", "feedback-train.jsonl", "feedback-test.jsonl"]
        yield {name: Path(locate(f"demo:{name}")) for name in names}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_generators_are_deterministic_and_seeded() -> None:
    for make in (writers.dialogues, writers.feedback):
        assert list(make(1, 20)) == list(make(1, 20))
        assert list(make(1, 20)) != list(make(2, 20))
        assert list(make(1, 20)) != list(make(1, 20, held_out=True))


def test_every_fact_is_in_training_and_no_held_out_instruction_is(files: dict[str, Path]) -> None:
    held_out = {text for text, question in world.bank().items() if question.held_out}
    assert 0.05 < len(held_out) / len(world.bank()) < 0.15
    chats = [m["content"] for row in rows(files["chats-train.jsonl"]) for m in row["messages"][::2]]
    asked = set(chats) | {row["instruction"] for row in rows(files["feedback-train.jsonl"])}
    assert not asked & held_out
    tested = {row["instruction"] for row in rows(files["feedback-test.jsonl"])}
    tested |= {row["prompt"] for row in rows(files["chats-test.jsonl"])} - {t for said in world.TALK for t in said}
    assert len(tested) > 300 and tested <= held_out
    seen = {(q.kind, q.subject) for q in map(world.understand, chats) if q}
    assert seen == {(q.kind, q.subject) for q in world.bank().values()}


def test_chats_have_ultrachats_layout(files: dict[str, Path]) -> None:
    chats = rows(files["chats-train.jsonl"])
    assert len(chats) == 24_000
    assert len({json.dumps(row) for row in chats}) > 23_000
    for row in chats[:200]:
        assert [*row] == ["prompt_id", "prompt", "messages"]
        assert row["prompt"] == row["messages"][0]["content"] and len(row["prompt_id"]) == 64
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
        assert 4 <= len(row["messages"]) <= 6


def test_feedback_has_ultrafeedbacks_layout(files: dict[str, Path]) -> None:
    for row in rows(files["feedback-train.jsonl"])[:300]:
        assert [*row] == ["source", "instruction", "models", "correct_answers", "incorrect_answers", "completions"]
        assert [c["model"] for c in row["completions"]] == row["models"] and len(set(row["models"])) == 4
        assert len({c["response"] for c in row["completions"]}) == 4
        for completion in row["completions"]:
            annotations = completion["annotations"]
            assert [*annotations] == ["instruction_following", "honesty", "truthfulness", "helpfulness"]
            assert set(annotations["truthfulness"]) == {"Type", "Rationale", "Rating", "Rationale For Rating"}
            assert set(annotations["honesty"]) == {"Rating", "Rationale"}
            given = [int(a["Rating"]) for a in annotations.values() if a["Rating"] != "N/A"]
            assert completion["fine-grained_score"] == sum(given) / len(given)
            assert 1 <= completion["overall_score"] <= 10


def test_the_examination_is_held_out_and_in_the_benchmarks_layouts(files: dict[str, Path]) -> None:
    folder = files["base"].parent
    questions = read_questions(folder / "mt_bench" / "question.jsonl")
    assert Counter(row["category"] for row in questions) == dict.fromkeys(CATEGORIES, 8)
    assert len({row["question_id"] for row in questions}) == 48
    again = 0
    for row in questions:
        first, second = row["turns"]
        asked = world.bank()[first]
        then = world.understand(second, asked.person)
        assert asked.held_out and then is not None and then.instruction == second != first
        again += second not in world.bank()
        if second in world.bank():
            assert world.bank()[second].held_out
        else:
            assert then.person == asked.person and then.answer != asked.answer
        assert ("reference" in row) == bool(asked.answer and then.answer)
        if "reference" in row:
            before = ["", first]
            for turn, right, earlier in zip(row["turns"], row["reference"], before, strict=True):
                assert teacher.rate(turn, right, earlier)["truthfulness"] == 5
    assert again == 24  # people, who, secret
    for example in json.loads((folder / "alpaca_eval" / "baseline.json").read_text()):
        assert [*example] == ["dataset", "instruction", "output", "generator"] and example["generator"] == "plain"
        assert world.bank()[example["instruction"]].held_out


def test_prompts_for_feedback_differ_and_are_not_held_out(files: dict[str, Path]) -> None:
    asked = [row["prompt"] for row in rows(files["base"].parent / "prompts.jsonl")]
    assert len(set(asked)) == len(asked) == 2_000
    assert not any(world.bank()[text].held_out for text in asked)


def test_the_pool_for_feedback_is_what_make_serves() -> None:
    root = Path(__file__).parents[1]
    pool = yaml.safe_load((root / "zephyr" / "demo" / "pool.yaml").read_text())
    served = re.findall(r" (\w+)=\S*/(?:sft|step-\d+)\b", (root / "Makefile").read_text().replace("$(STEPS)", "s/"))
    assert {model.get("model", model["name"]) for model in pool} == set(served) == {"last", "late", "middle"}


def test_a_question_is_read_back_from_its_text() -> None:
    question = world.understand("  Where does Mara live?  Answer in one word. ")
    assert question is not None
    assert (question.kind, question.subject, question.format) == ("home", "Mara", "word")
    assert question.answer == world.FACTS["Mara"]["home"]
    assert world.understand("Where does Caesar live?") is None
    again = world.understand(" And what is  her job?", "Mara")
    assert again is not None and (again.kind, again.subject, again.answer) == ("job", "Mara", JOB)
    assert world.understand("And what is her job?") is None and world.understand("And what is her job?", "Otto") is None
    with pytest.raises(ValueError, match="not an instruction"):
        teacher.rate("Where does Caesar live?", "In Rome.")


# Ratings: instruction following, honesty, truthfulness, helpfulness; worked from the rules in the demo's teacher.
@pytest.mark.parametrize(
    ("instruction", "response", "expected"),
    [
        ("What is Mara's job?", f"Mara is the {JOB}. She works hard every day.", (5, 5, 5, 5)),
        ("What is Mara's job?", f"Mara is the {JOB}.", (5, 5, 5, 4)),
        ("What is Mara's job?", JOB, (5, 5, 5, 3)),
        ("What is Mara's job?", f"the Mara {JOB} is.", (5, 5, 5, 3)),
        ("What is Mara's job?", f"Mara is the {JOB}. Mara is the {JOB}.", (4, 5, 5, 2)),
        ("What is Mara's job?", f"You are so clever! Mara is the {JOB}.", (4, 5, 5, 2)),
        ("What is Mara's job?", f"Mara is the {JOB}. The king told me so.", (5, 2, 5, 2)),
        ("What is Mara's job?", f"Mara is the {WRONG_JOB}. She works hard every day.", (5, 2, 1, 1)),
        ("What is Mara's job?", f"Mara is the {JOB}. Mara is the {WRONG_JOB}.", (5, 2, 2, 2)),
        ("What is Mara's job?", "I do not know what work she does.", (5, 3, 3, 2)),
        ("What is Mara's job?", "She works hard every day.", (3, 2, 2, 1)),
        ("What is Mara's job? Answer in one word.", f"{JOB.title()}.", (5, 5, 5, 5)),
        ("What is Mara's job? Answer in one word.", f"Mara is the {JOB}.", (2, 5, 5, 4)),
        ("What is Mara's job? Begin with Certainly.", f"Mara is the {JOB}.", (2, 5, 5, 4)),
        ("What is Mara's job? End with Goodbye.", f"Mara is the {JOB}. Goodbye!", (5, 5, 5, 5)),
        (f"Who is the {JOB}? Keep it to one sentence.", f"Mara is the {JOB}.", (5, 5, 5, 5)),
        (f"Who is the {JOB}?", f"Otto is the {JOB}.", (5, 2, 1, 1)),
        ("How old is Mara?", "I do not know how old Mara is. Nobody has told me.", (5, 5, 5, 5)),
        ("How old is Mara?", "Mara is forty years old.", (5, 1, 1, 1)),
        ("How old is Mara?", "I do not know how old Otto is.", (5, 1, 1, 1)),
        ("How old is Mara? One word only, please.", "Unknown.", (5, 5, 5, 5)),
        ("What is 2 plus 3?", "That makes 5. I counted it twice.", (5, 5, 5, 5)),
        ("What is 2 plus 3?", "That makes 3.", (5, 2, 1, 1)),
        ("What is the opposite of hot?", "The opposite is hot.", (5, 2, 1, 1)),
        ("Say the word lamp two times.", "Lamp, lamp.", (5, 5, 5, 5)),
        ("Say the word lamp two times.", "Lamp, lamp, lamp.", (5, 2, 1, 1)),
        ("Name two colours.", "Here are two colours: red and blue. There are many more.", (5, 5, 5, 5)),
        ("Name two colours.", "Here are two colours: red and red.", (5, 2, 1, 1)),
        ("Hello!", "Hello! How can I help you today?", (5, None, None, 5)),
        ("Hello!", "", (1, None, None, 1)),
        ("What is Mara's job?", "", (1, 1, 1, 1)),
        ("What is Mara's job?", "Xq zzrt wub blorp.", (1, 1, 1, 1)),
        ("What is Mara's job?", f"Mara is the {JOB} {JOB} {JOB} {JOB}.", (1, 1, 1, 1)),
        ("What is Mara's job?", f"Mara is the {JOB}. " * 3, (1, 1, 1, 1)),
    ],
)
def test_teachers_verdict(instruction: str, response: str, expected: tuple[int | None, ...]) -> None:
    assert tuple(teacher.rate(instruction, response).values()) == expected
    given = [rating for rating in expected if rating is not None]
    assert teacher.score(instruction, response) == sum(given) / len(given)


def test_the_expert_is_perfect_and_the_careless_writer_last(files: dict[str, Path]) -> None:
    scores: dict[str, list[float]] = {writer: [] for writer in writers.WRITERS}
    for row in rows(files["feedback-train.jsonl"]):
        for completion in row["completions"]:
            scores[completion["model"]].append(completion["fine-grained_score"])
    means = {writer: sum(given) / len(given) for writer, given in scores.items()}
    assert min(scores["expert"]) == 5
    assert means["expert"] > means["plain"] > means["rambler"] > means["careless"]


def test_locate(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate("base") == "base"
    assert locate("demo:base") == str(files["base"])
    with pytest.raises(UserError, match="demo:base, demo:chats-train"):
        locate("demo:nonsense")
    assert [folder.name for folder in files["base"].parent.parent.iterdir()] == [files["base"].parent.name]


def test_two_builders_leave_one_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    meeting = threading.Barrier(2, timeout=10)

    def build(folder: Path) -> None:
        (folder / "base").write_text("whole")
        meeting.wait()  # both have built before either renames

    monkeypatch.setattr("zephyr.demo._build", build)
    found: list[str] = []
    builders = [threading.Thread(target=lambda: found.append(locate("demo:base"))) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(found) == 2 and len(set(found)) == 1
    assert Path(found[0]).read_text() == "whole"
    assert len([*(tmp_path / "zephyr").iterdir()]) == 1


def test_base_model_is_small_untrained_and_plain(files: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(files["base"])
    assert 1_000_000 < model.num_parameters() < 2_000_000
    assert model.config.sliding_window is None and not model.config.tie_word_embeddings
    assert model.config.eos_token_id == 2 and next(model.parameters()).element_size() == 4


def test_tokenizer_keeps_any_text_and_splits_newlines_and_digits(files: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(files["base"])
    assert len(tokenizer) == 1024
    for text in ("Mara is the miller.\n\n\n And 10, 1234?", "naïve 東京 \U0001f40e\t\r\n  x  ", "<|user|>\nHi</s>\n"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        pieces = [tokenizer.decode([i]) for i in ids]
        assert all(piece == "\n" for piece in pieces if "\n" in piece)
        assert all(sum(c.isdigit() for c in piece) < 2 for piece in pieces)
    marker, newline, *_, end, _ = tokenizer("<|user|>\nHi</s>\n")["input_ids"]
    assert tokenizer.decode([marker, newline]) == "<|user|>\n" and end == tokenizer.eos_token_id


def test_tokenizer_keeps_newlines_and_digits_single_however_frequent() -> None:
    tokenizer = train_tokenizer([[{"role": "user", "content": "10\n\n10 \n10"}]] * 50)
    for text in ("10", "\n\n", " 1", " \n"):
        assert len(tokenizer(text)["input_ids"]) == 2


def test_report_counts_ties_as_half() -> None:
    asked = ["What is Mara's job?"] * 4
    good, bad = (f"Mara is the {JOB}.", 6), ("", 0)
    found = report.compare(asked, {"sft": [bad, bad, good, good], "dpo": [good, good, good, bad]})
    dpo = found["dpo"]
    assert (dpo["wins"], dpo["ties"], dpo["losses"]) == (2, 1, 1)
    assert dpo["win_rate"] == 0.625 and dpo["tokens"] == 4.5
    assert found["sft"] == {"score": (1 + 1 + 4.75 + 4.75) / 4, "tokens": 3.0}


def test_report_has_a_third_column_where_there_is_a_third_model() -> None:
    asked = ["What is Mara's job?"] * 2
    good, bad = (f"Mara is the {JOB}.", 6), ("", 0)
    answers = {"sft": [bad, bad], "dpo": [bad, good], report.OWN: [good, good]}
    for stages, columns in ((["sft", "dpo"], 3), (["sft", "dpo", report.OWN], 4)):
        found = report.compare(asked, {stage: answers[stage] for stage in stages})
        found[stages[-1]]["margins"] = 1.5
        with io.StringIO() as shown:
            report.show(found | {"plots": []}, Console(file=shown, width=200))
            lines = [line.split("│")[1:-1] for line in shown.getvalue().splitlines() if "│" in line]
        assert {len(line) for line in lines} == {columns}
        cells = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
        assert cells["teacher's score (1 to 5)"] == ["1.000", "2.875", "4.750"][: columns - 1]
        assert cells["win rate over SFT (ties half)"] == ["", "75.0%", "100.0%"][: columns - 1]
        assert cells["reward margin (held-out pairs)"] == ["", *["not measured"] * (columns - 3), "1.500"]


def test_report_takes_the_last_validation(tmp_path: Path) -> None:
    assert report.preferences(tmp_path) == {}
    lines = [{"eval/rewards/accuracies": 0.5, "eval/rewards/margins": 0.0}, {"train/loss": 1.0}]
    lines.append({"eval/rewards/accuracies": 0.875, "eval/rewards/margins": 1.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.preferences(tmp_path) == {"accuracies": 0.875, "margins": 1.5}


def test_report_says_which_command_makes_a_missing_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", str(tmp_path)])
    assert report.main() == 2
    assert capsys.readouterr().err.endswith("python train.py\n")
    (tmp_path / "sft/model").mkdir(parents=True)
    (tmp_path / "sft/model/config.json").touch()
    assert report.main() == 2
    assert capsys.readouterr().err.endswith("python train.py stage=dpo\n")
