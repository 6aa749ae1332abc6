import dataclasses
import pickle
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zephyr.data.filters import RULES, Filters
from zephyr.errors import UserError

OFF = Filters(
    refusals=[],
    personas=[],
    openings=[],
    alternation=False,
    empty=False,
    broken=False,
    cut=False,
    languages=[],
    min_messages=None,
    max_messages=None,
    min_message_characters=None,
    max_message_characters=None,
    min_dialogue_characters=None,
    max_dialogue_characters=None,
)
REFUSALS = ["I do not have emotions", "I do not have opinions", "I do not have personal experiences"]
PERSONAS = ["as an AI language model", "as an AI,", "I am an AI", "my knowledge cut-off", "I can't feel", "I do not"]
OPENINGS = ["I cannot help", "I am sorry, but I", "As an AI"]
ON = dataclasses.replace(
    OFF,
    refusals=REFUSALS,
    personas=PERSONAS[:-1],
    openings=OPENINGS,
    alternation=True,
    empty=True,
    broken=True,
    cut=True,
    languages=["en"],
    min_messages=2,
    max_messages=20,
    max_dialogue_characters=100_000,
)


def chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def roles(*names):
    return [{"role": name, "content": "Some words."} for name in names]


def met(messages, **rules):
    found = dataclasses.replace(OFF, **rules)(messages)
    return found and found[0]


# Phrases


@pytest.mark.parametrize(
    "answer",
    [
        "I do not have emotions.",
        "Well, i DON'T have emotions, but rust forms when iron meets water.",
        "I don\u2019t have  personal\n\texperiences of that kind",
        "As a program I don't have opinions: read both books.",
        'He wrote "Winter" in 1911. I do not have opinions on it.',
        "```\nprint()\n```\nI do not have emotions.",
    ],
)
def test_refusals_are_met_in_any_case_spacing_and_contraction(answer):
    assert met(chat("Why does iron rust?", answer), refusals=REFUSALS) == "refusal"


@pytest.mark.parametrize(
    "answer",
    [
        "I do not have emotionsickness.",
        "Hawaii don't have opinions",  # the phrase begins inside a word
        "I do not often have opinions.",
        'The robot said: "Sir, I do not have emotions." Nobody laughed.',
        "She smiled. \u201cI don't have opinions\u201d, she lied.",
        "```python\nreply = I do not have emotions\n```",
        "Do I not have emotions?",
        "",
    ],
)
def test_what_only_looks_like_a_refusal_is_kept(answer):
    assert met(chat("Why does iron rust?", answer), refusals=REFUSALS) is None


def test_phrases_are_looked_for_in_assistant_turns_only():
    assert met(chat("I do not have emotions. Help me.", "Walk a little every day."), refusals=REFUSALS) is None
    system = [{"role": "system", "content": "You are kind. I do not have opinions."}]
    assert met(system + chat("Hi", "Hello."), refusals=REFUSALS, openings=["You are kind"]) is None
    assert met(chat("Hi", "Hello.", "Who won?", "I don't have opinions."), refusals=REFUSALS) == "refusal"


@pytest.mark.parametrize(
    "answer, rule",
    [
        ("Sure! As an AI language model, I have read of it.", "persona"),
        ("As an AI, I can list them.", "persona"),
        ("As an AI researcher you earn well.", None),
        ("I'm an AI.", "persona"),
        ("I AM\nAN  AI", "persona"),
        ("Ami am an air traffic controller", None),
        ("Miami\u2019m an AI", None),
        ("It lies behind my knowledge cut-off.", "persona"),
        ("Sharpen my knowledge, cut off a branch", None),
        ("I cannot feel it", "persona"),
        ("I can not feel it", "persona"),
        ("I can feel it", None),
        ("I don\u02bct", "persona"),
        ("I donut", None),
    ],
)
def test_personas_and_their_near_misses(answer, rule):
    assert met(chat("Tell me.", answer), personas=PERSONAS) == rule


@pytest.mark.parametrize(
    "answer, rule",
    [
        ("I can't help with that.", "opening"),
        ("  **I cannot help** with that.", "opening"),
        ("I'm sorry, but I have to stop here.", "opening"),
        ("I am sorry, but it rains.", None),
        ("Whoever says I cannot help is wrong.", None),
        ("I cannot helplessly watch.", None),
        ("As an AI you would know.", "opening"),
        ("As an AID worker you would know.", None),
    ],
)
def test_openings_count_at_the_start_only(answer, rule):
    assert met(chat("Tell me.", answer), openings=OPENINGS) == rule


def test_phrases_are_plain_text_not_patterns():
    assert met(chat("?", "a.b (c)* | d"), personas=["a.b (c)*"]) == "persona"
    assert met(chat("?", "axb cc"), personas=["a.b (c)*", "x|cc"]) is None
    assert met(chat("?", "Als KI-Sprachmodell weiß ich das."), personas=["als KI-Sprachmodell"]) == "persona"


def test_evidence_shows_the_phrase_in_its_place():
    answer = (
        "Much was written about it, and much forgotten. " * 5
        + "Yet I do not\nhave opinions on it, "
        + " ".join(map(str, range(200)))
    )
    rule, evidence = ON(chat("What of this book is worth reading?", answer))
    assert rule == "refusal"
    assert "Yet I do not have opinions on it" in evidence and len(evidence) <= 80


# Order and emptiness


@pytest.mark.parametrize(
    "order, rule",
    [
        (["user", "assistant"], None),
        (["system", "user", "assistant", "user"], None),  # a prompt for generation
        (["user", "assistant", "user", "assistant"], None),
        (["assistant", "user"], "alternation"),
        (["user", "user", "assistant"], "alternation"),
        (["user", "assistant", "assistant"], "alternation"),
        (["user", "system", "assistant"], "alternation"),
        (["system", "system", "user", "assistant"], "alternation"),
        (["user"], "alternation"),
        (["system", "user"], "alternation"),
        (["user", "tool"], "alternation"),
        ([], "alternation"),
    ],
)
def test_order_of_speakers(order, rule):
    assert met(roles(*order), alternation=True) == rule


def test_the_evidence_of_order_names_the_speakers():
    assert dataclasses.replace(OFF, alternation=True)(roles("user", "user")) == ("alternation", "user, user")
    assert dataclasses.replace(OFF, alternation=True)([]) == ("alternation", "no message")


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b\ufeff \u00a0\u2003\u200d", "\u3000"])
def test_a_turn_without_a_visible_character_is_empty(text):
    assert met(chat("Hi", text), empty=True) == "empty"
    assert met(chat(text, "Hello."), empty=True) == "empty"
    assert met([{"role": "system", "content": text}, *chat("Hi", "Hello.")], empty=True) is None


@pytest.mark.parametrize("text", [".", "0", "\u200b👩\u200d🔧", " a "])
def test_a_visible_character_is_no_emptiness(text):
    assert met(chat(text, text), empty=True) is None


# Broken and cut


@pytest.mark.parametrize(
    "answer",
    [
        "The price is 5\ufffd a pound.",
        "A zero\x00 byte",
        "...",
        "?! \u2026",
        "\u3002",
        "ha " * 80,
        "It began well. " + "and so on, and " * 30,
        "It began well. " + "and so on, and " * 30 + "and so",  # cut anywhere
        "x" * 300,
        "Row\n" + "| yes | no |\n" * 20,
    ],
)
def test_broken_answers(answer):
    assert met(chat("Go on.", answer), broken=True) == "broken"
    assert met(chat(answer, "Fine."), broken=True) is None  # users may paste what they like


@pytest.mark.parametrize(
    "answer",
    [
        "*",
        "%",
        "👍",
        "42",
        "\u2713",
        "Tab\tand\r\nreturn are no damage.",
        "ha " * 40,  # somebody laughs
        "Above\n" + "-" * 500,
        "| --- | --- |\n" * 50,
        "0 0 0 0\n" * 100,
        "ha " * 100 + "and then it was over.",
        "\n".join(f"{i}. Do it again." for i in range(100)),
        "\n".join(f"{i}. Do it all over once more." for i in range(100)),
        "la la la. " * 9 + "The end of this refrain is near, my friends. " * 5,
        "",
    ],
)
def test_odd_answers_that_are_not_broken(answer):
    assert met(chat("Go on.", answer), broken=True) is None


@pytest.mark.parametrize(
    "answer",
    [
        "The house stood at the end of the",
        "It needs flour, sugar and ",
        "Because the harbour was frozen from December on,",
        "Try this:\n```python\nprint(1)\n",
        "Use `x`: ```\na\n``` or ```b",
    ],
)
def test_cut_answers(answer):
    assert met(chat("Go on.", answer), cut=True) == "cut"
    assert met(chat("Go on.", answer, "And?", "Done."), cut=True) == "cut"


@pytest.mark.parametrize(
    "answer",
    [
        "No full stop",
        "What is it made of?",
        "Eat more vitamin A",
        "Click on Sign in",
        "Dear Ann,\n\nI agree.\n\nYours sincerely,",
        "SELECT a OR",  # capitals name things
        "Try this:\n```python\nprint(1,\n```",
        "print(1)\n```\nThat is all of it.",  # an opening fence is missing
        "print(1)\n```That is all of it.",
        "```python\nprint(1)\n``` and ```python\nprint(2)\n```",
        "They are a band",
        "Turn the lathe",
        "",
    ],
)
def test_complete_answers_are_not_cut(answer):
    assert met(chat("Go on.", answer), cut=True) is None


# Length


@pytest.mark.parametrize(
    "limits, rule",
    [
        ({"min_messages": 4}, None),
        ({"min_messages": 5}, "length"),
        ({"max_messages": 4}, None),
        ({"max_messages": 3}, "length"),
        ({"min_message_characters": 1}, None),
        ({"min_message_characters": 2}, "length"),
        ({"max_message_characters": 7}, None),
        ({"max_message_characters": 6}, "length"),
        ({"min_dialogue_characters": 26}, None),
        ({"min_dialogue_characters": 27}, "length"),
        ({"max_dialogue_characters": 26}, None),
        ({"max_dialogue_characters": 25}, "length"),
    ],
)
def test_limits_are_inclusive_and_the_system_turn_is_no_message(limits, rule):
    messages = [{"role": "system", "content": "0123456789"}, *chat("1", "4444", "4444", "7777777")]  # 10+1+4+4+7 = 26
    assert met(messages, **limits) == rule


def test_the_evidence_of_length_has_its_unit():
    assert dataclasses.replace(OFF, max_messages=1)(chat("a", "b")) == ("length", "2 messages")
    assert dataclasses.replace(OFF, max_message_characters=2)(chat("a", "bcd")) == (
        "length",
        "3 characters in a message",
    )


# Language

ENGLISH = "The old mill by the river was sold last spring, and nobody in the village knows who has bought it."
GERMAN = (
    "Die alte Mühle am Fluss wurde im Frühling verkauft, und niemand im Dorf weiß, wer sie gekauft hat. "
    "Manche sagen, es sei ein Maler aus der Stadt gewesen, andere glauben das nicht."
)
OTHERS = {
    "de": GERMAN,
    "nl": "De oude molen aan de rivier werd in het voorjaar verkocht, en niemand in het dorp weet wie hem gekocht heeft. Wat is er van de molenaar geworden? Hij was een man van weinig woorden.",
    "fr": "Le vieux moulin au bord de la rivière a été vendu au printemps, et personne au village ne sait qui l'a acheté.",
    "es": "El viejo molino a la orilla del río se vendió en primavera, y nadie en el pueblo sabe quién lo ha comprado.",
    "pt": "O velho moinho à beira do rio foi vendido na primavera, e ninguém na aldeia sabe quem o comprou, nem por quanto.",
    "it": "Il vecchio mulino in riva al fiume è stato venduto in primavera, e nessuno in paese sa chi lo abbia comprato.",
    "da": "Den gamle mølle ved åen blev solgt i foråret, og ingen i landsbyen ved, hvem der har købt den for så mange penge.",
    "hu": "A folyó melletti régi malmot tavasszal eladták, és a faluban senki sem tudja, ki vette meg.",
    "ru": "Старую мельницу продали весной, и никто в деревне не знает, кто её купил.",
    "ja": "川のそばの古い水車小屋は春に売られましたが、誰が買ったのか村の人は誰も知りません。",
}


@pytest.mark.parametrize("code", OTHERS)
def test_foreign_dialogues_are_told(code):
    found = dataclasses.replace(OFF, languages=["en"])(chat(OTHERS[code], OTHERS[code]))
    assert found and found[0] == "language" and found[1].startswith(f"{code}: ")
    assert met(chat(OTHERS[code], OTHERS[code]), languages=["en", code]) is None


@pytest.mark.parametrize(
    "texts",
    [
        [ENGLISH, ENGLISH],
        ["Translate this into English: " + GERMAN, ENGLISH],
        ["Write a story about a mill in German.", GERMAN],
        ["You will be given a passage. Which of its words are names, and why? " + GERMAN * 3, "Ja, gern! " + GERMAN],
        ["Author a Latin requiem in A minor using iambic pentameter", GERMAN],
        ["Wie geht es dir heute, mein Freund?", "Gut, danke der Frage!"],  # too short to tell
        ["für = und(oder, nicht)\n" * 8, "let mut värde = gräns;\nlåt(färg);\n" * 5],
        ["Wrap:\n```\n" + GERMAN + "\n```", "```\n" + GERMAN],
        ["def f(x):\n    return x + 1  # funcion", "```\nfür = und(oder, nicht)\n```" * 20],
        [
            "SELECT name, adresse FROM kunden WHERE stadt = 'Bonn';" * 5,
            "CREATE TABLE kunden (name TEXT, stadt TEXT);" * 5,
        ],
        ["1 2 3 4 5", "6 7 8 9 10"],
        ["http://example.org/der/die/das/und/nicht/oder/aber/doch/immer/noch", "https://example.org/les/des/une/aux"],
        ["", ""],
        [],
    ],
)
def test_english_exercises_code_and_short_texts_stay(texts):
    assert met(chat(*texts), languages=["en"]) is None


@pytest.mark.parametrize("prompt", ["Escreva um poema a respeito do mar", "Hvad er det for en by i Danmark"])
def test_words_shared_with_english_do_not_make_a_prompt_english(prompt):
    assert met(chat(prompt, OTHERS["pt"]), languages=["en"]) == "language"


def test_english_is_foreign_where_another_language_is_wanted():
    assert met(chat(ENGLISH, ENGLISH), languages=["de"]) == "language"
    assert met(chat(GERMAN, ENGLISH), languages=["de"]) is None


def test_an_unknown_language_is_refused_by_name():
    with pytest.raises(UserError, match=r"languages: english cannot be told from others. Known are .*\bde\b.*\ben\b"):
        dataclasses.replace(OFF, languages=["english"])


@pytest.mark.parametrize("rule", ["refusals", "personas", "openings"])
@pytest.mark.parametrize("phrase", ["", " ", "..."])
def test_a_phrase_that_would_meet_everything_is_refused(rule, phrase):
    with pytest.raises(UserError, match=f"{rule}: .* is no phrase"):
        dataclasses.replace(OFF, **{rule: ["I am an AI", phrase]})


# All of them

TRIGGERS = {
    "alternation": roles("assistant", "user"),
    "empty": chat("Hi there, how are you?", " "),
    "length": chat(*["Some words."] * 30),
    "broken": chat("Hi", "\ufffd"),
    "cut": chat("Hi", "It stood at the end of the"),
    "refusal": chat("Hi", "I do not have emotions."),
    "persona": chat("Hi", "I am an AI."),
    "opening": chat("Hi", "I cannot help."),
    "language": chat(GERMAN, GERMAN),
}


def test_every_rule_has_its_dialogue_and_its_switch():
    assert list(TRIGGERS) == list(RULES)
    for rule, messages in TRIGGERS.items():
        assert ON(messages)[0] == rule
        assert OFF(messages) is None
    assert ON(chat(ENGLISH, ENGLISH)) is None


def test_the_first_rule_in_order_is_named():
    everything = [{"role": "user", "content": ""}, *chat("", "\ufffd I do not have emotions. I am an AI. " + GERMAN)]
    assert ON(everything)[0] == "alternation"
    assert ON(everything[1:])[0] == "empty"
    assert ON(chat("Hi", everything[2]["content"]))[0] == "broken"


def test_filters_travel_to_other_processes():
    ON(TRIGGERS["opening"])
    copy = pickle.loads(pickle.dumps(ON))
    assert all(copy(messages) == ON(messages) for messages in TRIGGERS.values())


messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(st.characters())}
    )
)


@given(messages)
def test_any_messages_have_an_answer(some):
    found = ON(some)
    assert found is None or (found[0] in RULES and len(found[1]) <= 80)


@given(st.sampled_from(sorted(TRIGGERS)), st.text("ab .\n", max_size=50))
def test_text_put_before_an_answer_does_not_hide_a_refusal(rule, before):
    assert met(chat("Hi", f"{before} I do not have emotions."), refusals=REFUSALS) == "refusal"


def test_long_texts_take_time_in_proportion():
    filters = dataclasses.replace(ON, max_dialogue_characters=None)
    for unit in ("!" * 20, "I do not ", '"I do not have emotions." ', "```", "$$ ", "ab", "(a", "\u200b", " \n"):
        start = time.process_time()
        filters(chat("Hi", unit * (300_000 // len(unit)) + " and then it was over."))
        assert time.process_time() - start < 5, unit
