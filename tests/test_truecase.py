"""The truecaser: what it mends, what it leaves alone, and how its table is counted."""

import gzip
import importlib
import json
import random
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks import truecasing
from zephyr.data.truecase import DEFAULT_TABLE, Truecaser, faults, truecase
from zephyr.data.truecase.casing import Table, learn, merge
from zephyr.data.truecase.lowered import LowerMessage
from zephyr.data.truecase.mending import KINDS, Change
from zephyr.errors import UserError

PACKAGE = importlib.import_module("zephyr.data.truecase")

MENDED = [
    ("hello there. how are you?", "Hello there. How are you?"),
    ("It rained. we stayed at home.", "It rained. We stayed at home."),
    ('He left. "where to?" she wondered aloud.', 'He left. "Where to?" she wondered aloud.'),
    (
        "She calls it (the old way.) the rest of us agree with her.",
        "She calls it (the old way.) The rest of us agree with her.",
    ),
    ("What a day! the sun came out.", "What a day! The sun came out."),
    (
        "First paragraph here.\n\nthe second one is longer and ends.",
        "First paragraph here.\n\nThe second one is longer and ends.",
    ),
    ("It was founded in 1998. since then it has grown.", "It was founded in 1998. Since then it has grown."),
    ("The bus leaves at 7 am. the tickets cost 12 dollars.", "The bus leaves at 7 am. The tickets cost 12 dollars."),
    ("I think i know what i want.", "I think I know what I want."),
    (
        "Well, i'm sure i've seen what i'd need, and i'll buy it.",
        "Well, I'm sure I've seen what I'd need, and I'll buy it.",
    ),
    (
        "Well, i’m sure i’ve seen what i’d need, and i’ll buy it.",
        "Well, I’m sure I’ve seen what I’d need, and I’ll buy it.",
    ),
    ("Can I come? i can, can i?", "Can I come? I can, can I?"),
    ("We met in paris on tuesday, not in december.", "We met in Paris on Tuesday, not in December."),
    ("She moved from germany to new york.", "She moved from Germany to New York."),
    ("He works for nasa, she is from japan.", "He works for NASA, she is from Japan."),
    ("Michael's plan was known to michael's brother.", "Michael's plan was known to Michael's brother."),
    (
        "what is the capital of france? i have never been to the united states.",
        "What is the capital of France? I have never been to the United States.",
    ),
    (
        "my friend john smith lives in los angeles and works for ibm. he likes it.",
        "My friend John Smith lives in Los Angeles and works for IBM. He likes it.",
    ),
    ("nASA launched it.", "NASA launched it."),
    (
        "école is a French word, and the school is called that.",
        "École is a French word, and the school is called that.",
    ),
]
LEFT_ALONE = [
    "Use it:\n```python\nfor i in range(3):\n    print(i). then\n```\nDone.",
    "Run `i = 1. then` now.",
    "An open fence:\n```\nhello. world i am\n",
    "Here it is:\n\n    x = paris. then i\n    print(x)\n",
    "See https://example.com/paris. or www.london.org/i for more.",
    "Write to john.smith@example.com or i@paris.org soon.",
    "It is in /home/john/paris or ~/monday and C:\\paris\\london today.",
    "The value $i. then$ and \\(x_i. y\\) and $$i + 1. j$$ differ.",
    "Call get_paris or my.monday.value and parisLondon here.",
    "for i in range(5): print(i)",
    "We have:\n\nx = 1\n\nwhere x is the number of cats.",
    "Is it so?\nii. Is it practical?",
    "Ask @john about #monday and #paris.",
    "a) The first\nb) The second\ni. The third\nii) The fourth",
    "Choose one drink for tonight - 1. tea 2. coffee 3. milk and sugar",
    "Steps:\n- preheat the oven\n- mix the flour\n* stir it\n1. wait",
    "My iPhone is on eBay. iPhone users agree.",
    "Fruit, e.g. apples, i.e. the red ones, etc. and so on.",
    "Cats vs. dogs at 5 p.m. in the park, or at 6 a.m. if you like.",
    "npm install does it. npm run build too.",
    "Ask Dr. smith-like people, approx. forty of them, at No. ten.",
    "The U.S. is large, the U.K. is not, and Inc. magazine agrees.",
    "Well... maybe. Or… perhaps not.",
    "Yahoo! is a company and Jeopardy! was a show.",
    '"Stop!" he said. "Why?" asked the other.',
    "They asked (why?) and went.",
    "Part i of the book, chapter i and type i errors.",
    "For i in the list, i = 0 and the i-th of them, x[i] and i++ too.",
    "It is 3 + 2i, and i^2 = -1, where i is the imaginary unit.",
    "I gatti e i cani sono belli. i bambini giocano con i gatti nel parco.",
    "La casa es muy grande. me gusta mucho la casa de mi madre.",
    "De kat is groot. de hond is klein en het huis is niet van mij.",
    "Der Hund ist nicht groß. die Katze ist auch nicht groß und das Haus ist klein.",
    "Это не так. это правда.",
    "これはペンです。i",
    "x = 5; y = 6;\nreturn paris;",
    "She may march in May, and Bill will bill us.",
    "Put the china on the table and the turkey in the oven.",
    "He drinks java and polishes the polish furniture.",
    "def run(self):\n    return monday",
    "git reflog",
    "Kick. |x x x| x. |. . x|",
    "$ cd paris\n$ ls",
    "key: value\nname: paris_1",
    "| a | b |\n| paris. i | monday |",
    "",
    " ",
    "...",
]


@pytest.mark.parametrize(("before", "after"), MENDED)
def test_mends(before: str, after: str) -> None:
    assert truecase(before) == after


@pytest.mark.parametrize("text", LEFT_ALONE)
def test_leaves_alone(text: str) -> None:
    assert truecase(text) == text


def test_changes_are_what_is_applied_with_their_kinds() -> None:
    text = "i think paris is nice. he doesn't."
    assert faults("It is so. but i met him in london.") == [
        Change("sentence_start", 10, "but", "But"),
        Change("pronoun_i", 14, "i", "I"),
        Change("name", 27, "london", "London"),
    ]
    assert {change.kind for change in faults(text)} == {"sentence_start", "name"}
    assert "all_lower" in {
        change.kind for change in faults("my dog is old. it is from boston university. i live there.")
    }


# ruff: noqa: RUF001, SIM905
_FRAGMENTS = st.sampled_from(
    "hello I i i'm paris Paris monday nasa iPhone the The e.g. etc. U.S. said john's . ! ? ... : ; , ( ) [ ] \" ' - * \n \n\n ` ``` $ x_1 "
    "https://a.b a) 1. ß ŉ ǰ İ ı new york for in = 0 école é ﬁ Dr. https://x.y/z - C++ [your name] label: is here we are".split(
        " "
    )
)


@settings(max_examples=400, deadline=None)
@given(st.lists(_FRAGMENTS, max_size=30).map(" ".join) | st.text(max_size=80))
@example("hello i 0 i'm")  # the second i is no sign of mathematics
@example("for i in the house. hello i 5 i have")
def test_of_any_text_only_the_case_changes_and_only_once(text: str) -> None:
    once = truecase(text)
    assert len(once) == len(text)
    assert all(one == two or one.upper() == two for one, two in zip(text, once, strict=True))
    assert truecase(once) == once
    rebuilt = list(text)
    for change in faults(text):
        assert change.kind in KINDS
        assert text[change.start : change.start + len(change.before)] == change.before
        rebuilt[change.start : change.start + len(change.after)] = change.after
    assert "".join(rebuilt) == once


@settings(max_examples=400, deadline=None)
@given(st.lists(_FRAGMENTS, max_size=20).map(lambda parts: " ".join(["It rained. We've", *parts])))
def test_what_is_passed_by_has_no_fault(text: str) -> None:
    tokens = frozenset(PACKAGE._TOKENS.findall(text))
    assert faults(text) == LowerMessage(PACKAGE.default()._odds, text, tokens).changes()


def test_a_faultless_text_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PACKAGE, "LowerMessage", None)
    assert faults("We thought they'll come,\nyet we've seen nobody, as you'd have said.") == []


def test_counts_by_hand() -> None:
    table = learn(
        [
            "The old man met Anna again near a small house in Rome. Anna was very old then, and Rome's walls were older too.",
            "Please see `Rome here` with them now or in Rome.",
        ]
    )
    assert table.words == 22 + 9
    assert table.forms["Rome"] == 3  # twice in the first text, once in the second; the code is not counted
    assert table.forms["Anna"] == 1  # the other one begins a sentence
    assert table.forms["old"] == 2
    assert table.left["in rome"] == (0, 2)
    assert table.left["man met"] == (1, 0)
    assert table.right["man met"] == (1, 0)
    assert "then and" not in table.left  # a comma stands between
    assert table.left["very old"] == (1, 0)


def _texts() -> list[str]:
    dice = random.Random(1)
    words = "the man saw Anna and Rome or NASA near a river with an iPhone. Then he".split()
    return [" ".join(dice.choices(words, k=40)) for _ in range(60)]


def test_parts_add_up_to_the_whole_in_any_order(tmp_path) -> None:
    texts = _texts()
    whole = learn(texts)
    for parts in ([texts[:20], texts[20:25], texts[25:]], [texts[25:], texts[:20], texts[20:25]]):
        table = merge(learn(part) for part in parts)
        assert table == whole
        table.pruned().save(tmp_path / "parts.gz")
        whole.pruned().save(tmp_path / "whole.gz")
        assert (tmp_path / "parts.gz").read_bytes() == (tmp_path / "whole.gz").read_bytes()
    assert learn(texts[:30]) + learn(texts[30:]) == whole


def test_saved_and_loaded(tmp_path) -> None:
    table = learn(_texts()).pruned()
    table.save(tmp_path / "table.gz")
    assert Table.load(tmp_path / "table.gz") == table
    assert table.forms["Anna"] > 10 and table.forms["iPhone"] > 10


def test_pruning_keeps_what_decides() -> None:
    forms = Counter({"mark": 50, "Mark": 50, "rome": 1, "Rome": 99, "rare": 1, "old": 50})
    left = {
        "saint mark": (0, 9),
        "a mark": (9, 0),
        "the mark": (1, 1),
        "in rome": (0, 90),
        "with rome": (30, 0),
        "an old": (9, 0),
    }
    pruned = Table(forms, left, {}, 0).pruned()
    assert pruned.forms == {"mark": 50, "Mark": 50, "rome": 1, "Rome": 99, "old": 50}
    # too rare; no surer than Rome is alone; never anything but lower case
    assert pruned.left.keys() == left.keys() - {"the mark", "in rome", "an old"}


def test_a_table_learned_by_the_user_decides() -> None:
    texts = ["we went to Zorbia again and it was good to see the Quux there."] * 60
    own = Truecaser(learn(texts))
    assert own.truecase("He went to zorbia again.") == "He went to Zorbia again."
    assert truecase("He went to zorbia again.") == "He went to zorbia again."


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        gzip.compress(b"other\t3"),
        gzip.compress(b"zephyr casing 1\t3\nrome"),
        gzip.compress(b"x" * 99)[:-9],
    ],
)
def test_what_is_no_table_is_refused(tmp_path, content: bytes) -> None:
    (tmp_path / "table.gz").write_bytes(content)
    with pytest.raises(UserError, match="is no casing table"):
        Table.load(tmp_path / "table.gz")
    with pytest.raises(UserError, match="cannot be read"):
        Table.load(tmp_path / "absent.gz")


def test_the_shipped_table_is_small_and_has_a_card() -> None:
    assert DEFAULT_TABLE.stat().st_size < 2_000_000
    card = (DEFAULT_TABLE.parent / "casing.md").read_text()
    assert f"{Table.load(DEFAULT_TABLE).words:,}" in card


def test_the_benchmark_measures_by_hand(tmp_path, capsys) -> None:
    text = "Anna came. I saw her."
    assert truecasing.faults(text) == [0, 11]
    assert truecasing.restored([text], ["anna came. i saw her."], ["Anna came. i saw Her."]) == {
        "right": 1 / 2,
        "mended": 1 / 2,
        "changed": 2,
        "lost": 2,
    }
    assert truecasing.touched(["a b c d"], ["a B c d"]) == {"untouched": 1 / 4, "words": 4}
    assert truecasing.f1(["Anna and Rome"], ["Anna And rome"]) == {
        "f1": 1 / 2,
        "precision": 1 / 2,
        "recall": 1 / 2,
        "accuracy": 1 / 3,
    }
    rows = [{"text": f"Number {n} came. I saw it.", "doc": str(n), "source": "made"} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    truecasing.main(["--text", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out.json"), "--alone"])
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["results"]["zephyr"]["right"] == 1.0
    assert "mended" in capsys.readouterr().out


def test_a_word_beside_a_name_is_judged_by_what_it_is_beside_names() -> None:
    forms = Counter({"Zorbia": 100, "airport": 60, "Airport": 20, "town": 80, "Town": 2, "and": 9})
    caser = Truecaser(Table(forms, {"^ airport": (1, 40)}, {}, 0))
    text = "we saw the zorbia airport and zorbia town. it was far from the airport. he liked it. we did too."
    assert caser.truecase(text) == (
        "We saw the Zorbia Airport and Zorbia town. It was far from the airport. He liked it. We did too."
    )
