import csv
import gzip
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zephyr.data.overlap import Contamination, Signatures, jaccard, words
from zephyr.errors import UserError

SIGNATURES = Signatures(threshold=0.8, permutations=128, run=3, seed=7)
PROMPT = "Tell me in three short lines why the harbour of Lisbon smells of tar and oranges in the early spring"


def user(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def shingles(text, run=3):
    tokens = words(text)
    return {tuple(tokens[i : i + run]) for i in range(max(1, len(tokens) - run + 1))}


def test_words_are_blind_to_casing_spacing_punctuation_and_width():
    assert words("  Don\u2019t  PANIC, said_the\nstraße… ") == ["don", "t", "panic", "said", "the", "strasse"]
    assert words("\ufb01ne \uff11\uff12") == ["fine", "12"]
    assert words("?! ... __") == []


# Signatures


def test_equal_texts_have_equal_signatures_and_others_do_not():
    one = SIGNATURES.signature(PROMPT)
    assert one.dtype == np.uint32 and one.shape == (128,)
    assert (one == SIGNATURES.signature(PROMPT.upper().replace(" ", "\n\t") + "?!")).all()
    assert jaccard(one, SIGNATURES.signature("How do I mend a bicycle tyre with a spoon?")) == 0
    assert (SIGNATURES.signature("🙂") != SIGNATURES.signature("🙃")).any()


def test_a_text_shorter_than_a_shingle_is_one_shingle():
    assert jaccard(SIGNATURES.signature("Write on"), SIGNATURES.signature("write ON.")) == 1
    assert jaccard(SIGNATURES.signature("Write on"), SIGNATURES.signature("write")) == 0


@pytest.mark.parametrize("size", [4, 30, 400])
def test_the_estimate_stays_within_binomial_error_of_the_exact_index(size):
    """Errors in units of sqrt(J (1 - J) / 128): a mean near 0, a spread of about 1, over 300 pairs of texts."""
    draw = random.Random(size)
    errors = []
    for _ in range(300):
        first = [f"w{draw.randrange(10**6)}" for _ in range(size + 2)]
        start = draw.randrange(1, size + 2)
        second = first[:start] + [f"v{draw.randrange(10**6)}" for _ in range(size + 2 - start)]
        a, b = " ".join(first), " ".join(second)
        exact = len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))
        if 0 < exact < 1:
            estimate = jaccard(SIGNATURES.signature(a), SIGNATURES.signature(b))
            errors.append((estimate - exact) / (exact * (1 - exact) / 128) ** 0.5)
    assert len(errors) > 80
    assert abs(np.mean(errors)) < 4 / len(errors) ** 0.5
    assert np.std(errors) < 1.2
    assert np.abs(errors).max() < 4.5


def test_signatures_are_those_of_any_other_process_and_release():
    """A release of the library that hashes otherwise would part texts that a resumed run has already signed."""
    code = (
        "from zephyr.data.overlap import Signatures; import hashlib; s = Signatures(0.8, 128, 3, 7); "
        f"x = s.signature({PROMPT!r}); print(hashlib.sha256(x.tobytes() + s.bands(x).tobytes()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "99"}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = SIGNATURES.signature(PROMPT)
    digest = hashlib.sha256(here.tobytes() + SIGNATURES.bands(here).tobytes()).hexdigest()
    assert other.stdout.strip() == digest
    assert digest == "dc402783260537f4d92bf92d900688bf1bee9f5f390d37632a419dda4a6d765e"


def test_another_seed_is_another_signature():
    assert (SIGNATURES.signature(PROMPT) != Signatures(0.8, 128, 3, 8).signature(PROMPT)).mean() > 0.9


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_the_layout_lets_pairs_at_the_threshold_meet(threshold):
    bands, rows = Signatures(threshold, 128, 3, 0).layout
    assert 1 <= bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.99
    more = rows + 1
    assert more > 128 or 1 - (1 - threshold**more) ** (128 // more) < 0.99


def test_the_layout_at_four_fifths_worked_by_hand():
    # 0.8^6 = 0.2621, (1 - 0.2621)^21 = 0.0017; one row more: 0.8^7 = 0.2097, (1 - 0.2097)^18 = 0.0145 > 0.01
    assert SIGNATURES.layout == (21, 6)


def test_bands_hash_their_rows_and_nothing_else():
    first = np.arange(128, dtype=np.uint32)
    second = first.copy()
    second[[0, 127]] += 1  # row 0 of band 0, and one of the two numbers that no band holds
    one, two = SIGNATURES.bands(first), SIGNATURES.bands(second)
    assert one.dtype == np.uint64 and one.shape == (21,)
    assert (one != two).tolist() == [True] + [False] * 20
    assert (SIGNATURES.bands(np.stack([first, second])) == np.stack([one, two])).all()
    assert len(set(SIGNATURES.bands(np.zeros(128, np.uint32)).tolist())) == 21


def test_near_duplicates_meet_in_a_band_and_strangers_do_not():
    draw = random.Random(3)
    met = strangers = 0
    for _ in range(200):
        text = [f"w{draw.randrange(10**5)}" for _ in range(60)]
        near = [*text[:-4], "other", "words", "at", "last"]  # 54 of 62 shingles: J = 0.87
        far = [f"v{draw.randrange(10**5)}" for _ in range(60)]
        a, b, c = (set(SIGNATURES.bands(SIGNATURES.signature(" ".join(t))).tolist()) for t in (text, near, far))
        met += bool(a & b)
        strangers += bool(a & c)
    assert met >= 197 and strangers == 0


def test_a_dialogue_is_signed_by_its_prompt_unless_that_says_nothing():
    system = [{"role": "system", "content": "Be brief."}]
    assert (SIGNATURES.of(system + user(PROMPT, "No.")) == SIGNATURES.of(user(PROMPT, "It does not."))).all()
    assert (
        jaccard(SIGNATURES.of(user("Hi", "Good day, who is it?")), SIGNATURES.of(user("Hi", "What now, pray?"))) < 0.5
    )
    assert (SIGNATURES.of(user("Hi", "Hello there")) == SIGNATURES.of(user("hi!", "Hello there."))).all()


@given(st.text(st.characters()))
@example("\ud800")
def test_any_text_has_a_signature(text):
    assert SIGNATURES.signature(text).shape == (128,)
    assert SIGNATURES.of([{"role": "user", "content": text}]).shape == (128,)


# Contamination


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def exam(tmp_path):
    folder = tmp_path / "exam"
    folder.mkdir()
    return jsonl(
        folder / "questions.jsonl",
        {"turns": ["One two three four five six seven.", "Eight nine, ten ELEVEN twelve thirteen"], "reference": None},
        {"turns": ["Name a blue bird"], "reference": ["It is the jay.", "Name a blue bird!", "a b c d e f g"]},
    )


def test_n_grams_worked_by_hand(exam):
    found = Contamination([exam], n=5, common=3)
    assert set(found.grams) == {
        "one two three four five",
        "two three four five six",
        "three four five six seven",
        "eight nine ten eleven twelve",
        "nine ten eleven twelve thirteen",
        "a b c d e",
        "b c d e f",
        "c d e f g",
    }
    assert found(user("Say: nine, ten; eleven\ntwelve thirteen, please")) == (
        "exam/questions.jsonl",
        "nine ten eleven twelve thirteen",
    )
    assert found(user("hello", "It begins: A, B, c d E!")) == ("exam/questions.jsonl", "a b c d e")


@pytest.mark.parametrize(
    "texts",
    [
        ["three four five six"],
        ["one two three", "four five six seven"],  # a run does not cross from message to message
        ["one two three nine four five six"],
        ["seven six five four three two one"],
        ["onetwo three four five six"],
        [""],
        [],
    ],
)
def test_what_is_no_n_gram_is_kept(exam, texts):
    assert Contamination([exam], n=5, common=3)(user(*texts)) is None


def test_a_short_prompt_is_met_by_a_whole_message_only(exam):
    found = Contamination([exam], n=5, common=3)
    assert found(user("Hello", "Hi", "name a BLUE bird!")) == ("exam/questions.jsonl", "name a blue bird")
    assert found(user("Name a blue bird for me")) is None
    assert found(user("Which bird?", "It is the jay.")) is None  # an answer of four words belongs to nobody


def test_a_prompt_of_three_words_is_nobodys_property(tmp_path):
    (tmp_path / "exam.txt").write_text("Please go on\nPlease go on now\n")
    found = Contamination([tmp_path / "exam.txt"], n=8, common=3)
    assert found(user("please go on")) is None
    assert found(user("please go on now"))


def test_a_sentence_that_many_prompts_share_is_a_template(tmp_path):
    frame = "Read the text below and answer its question briefly: "
    prompts = [frame + fruit + " why do they fall from the tree" for fruit in ("apples", "pears", "plums")]
    (tmp_path / "exam.txt").write_text("\n".join([*prompts, prompts[0].upper()]))
    found = Contamination([tmp_path / "exam.txt"], n=6, common=3)
    assert found(user(frame + "cats and dogs")) is None
    assert found(user("Say, why do they fall from the tree?")) is None
    assert found(user("its question briefly: PEARS, why do they...")) is not None
    assert Contamination([tmp_path / "exam.txt"], n=6, common=4)(user(frame)) is not None  # a repeat counts once


def test_every_benchmarks_fields_and_formats(tmp_path):
    jsonl(
        tmp_path / "code.jsonl",
        {"prompt": "def add one to each number", "canonical_solution": "return x plus one for all x"},
    )
    (tmp_path / "alpaca.json").write_text(
        json.dumps([{"instruction": "How warm is the sea in June", "output": "never read this text here"}])
    )
    with (tmp_path / "truth.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["Type", "Question"], ["odd", "Do cats, when bored,\nread the papers"]])
    pq.write_table(pa.Table.from_pylist([{"text": "a plain text in a table"}]), tmp_path / "plain.parquet")
    (tmp_path / "lines.txt").write_text("\n\nthe only line of this file\n")
    (tmp_path / "notes.md").write_text("no evaluation at all, you see")
    found = Contamination([tmp_path], n=5, common=3)
    names = {}
    for text in (
        "def add_one to each number",
        "Return x plus one for all x",
        "how warm is the sea",
        "cats when bored read the papers",
        "a plain text in a table",
        "the only line of this",
    ):
        names[text.split()[-1]] = found(user(text))[0].split("/")[1]
    assert list(names.values()) == [
        "code.jsonl",
        "code.jsonl",
        "alpaca.json",
        "truth.csv",
        "plain.parquet",
        "lines.txt",
    ]
    assert found(user("never read this text here")) is None
    assert found(user("no evaluation at all, you see")) is None


def test_it_travels_to_other_processes(exam):
    found = pickle.loads(pickle.dumps(Contamination([exam], n=5, common=3)))
    assert found(user("one two three four five"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.jsonl",
            b'{"id": 1, "query": "why"}\n',
            "a.jsonl line 1: an evaluation prompt needs one of the fields turns",
        ),
        ("a.jsonl", b'{"prompt": {"a": 1}}\n', "a.jsonl line 1: prompt is dict, not a text"),
        ("a.jsonl", b"{broken\n", "a.jsonl line 1: invalid JSON"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"prompt": " ?! "}\n', "a.jsonl holds none"),
        ("a.csv", b"Question\n", "a.csv holds none"),
        ("a.csv", b"Query\nwhy\n", "a.csv line 2: an evaluation prompt needs"),
        ("a.csv", b"Question\n\xff\xfe\n", "a.csv cannot be read: 'utf-8' codec"),
        ("a.txt", b"\xff\xff", "a.txt cannot be read: 'utf-8' codec"),
        ("a.parquet", b"PAR1", "not a readable Parquet file"),
        ("a.json", b'{"prompt": "why"}', "must hold a JSON list"),
        ("a.md", b"text", "is none of .jsonl"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        Contamination([tmp_path / name], n=8, common=3)
    assert message in str(error.value)


def test_missing_files_and_folders_without_prompts_are_named(tmp_path):
    for path, message in ((tmp_path / "no.jsonl", "does not exist"), (tmp_path, "holds no .jsonl")):
        with pytest.raises(UserError, match=message):
            Contamination([path], n=8, common=3)


@pytest.fixture(scope="module")
def exam_of_four_words(tmp_path_factory):
    path = tmp_path_factory.mktemp("four") / "exam.txt"
    path.write_text("one two three four\n")
    return Contamination([path], n=4, common=3)


@given(st.lists(st.text(st.characters())))
def test_any_dialogue_is_looked_through(exam_of_four_words, texts):
    assert exam_of_four_words(user(*texts)) is None


@given(st.lists(st.sampled_from(["one", "two", "two three", "three four", "four", "x"]), max_size=9))
def test_n_grams_are_found_as_in_the_definition(exam_of_four_words, parts):
    text = " ".join(parts)
    assert bool(exam_of_four_words(user(f"x {text}"))) == (" one two three four " in f" {text} ")


DATA = Path(__file__).parents[2] / "shared/data"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the folder of real data beside the checkout")
def test_real_evaluation_prompts_are_found_and_nothing_else():
    """1,699 records of feedback: the 800 whose prompts belong to an evaluation, three that stand in MT-Bench unmarked."""
    found = Contamination([DATA / "alpaca_eval/prompts.jsonl", DATA / "mt_bench/question.jsonl"], n=13, common=3)
    marked = unmarked = 0
    with gzip.open(DATA / "feedback.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            hit = found(user(row["instruction"])) is not None
            marked += hit and bool(row.get("x_eval_overlap"))
            unmarked += hit and not row.get("x_eval_overlap")
    assert (marked, unmarked) == (800, 3)
