"""Tokenised data and the steps made of it."""

import json
import threading

import pytest
import torch

from tests import tiny
from zephyr import settings
from zephyr.data.modules import ChatData, PreferenceData, Steps
from zephyr.errors import UserError

TOKENIZER = tiny.tokenizer()
HEADERS = len("<|user|>\n\n<|assistant|>\n\n") + 2  # markers and line breaks, one token a byte, and two </s>


def chats(folder, lengths, name="chats.jsonl"):
    """Conversations of these many tokens."""
    rows = []
    for number, length in enumerate(lengths):
        text = length - HEADERS
        rows.append([{"role": "user", "content": f"{number:03}"}, {"role": "assistant", "content": "a" * (text - 3)}])
    path = folder / name
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    return path


def pairs(folder, count, name="pairs.jsonl"):
    def side(number, text):
        return [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": text}]

    path = folder / name
    rows = [{"chosen": side(n, "yes" * (1 + n % 4)), "rejected": side(n, "no")} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat_data(folder, train, *, max_epochs=1.0, max_steps=None, seed=0, **changes):
    values = {
        "train": str(train), "validation": None, "max_length": 128, "batch_size": 2, "micro_batch_tokens": 256,
        "system": None, "bad_rows": "error", "workers": 0, "cache": str(folder / "cache"), "loss_on": "assistant",
    }  # fmt: skip
    data = ChatData(settings.ChatData(**{**values, **changes}), TOKENIZER, max_epochs, max_steps, seed)
    data.load()
    return data


def preference_data(folder, train, *, max_epochs=1.0, max_steps=None, seed=0, **changes):
    values = {
        "train": str(train), "validation": None, "max_length": 128, "batch_size": 4, "micro_batch_tokens": 100,
        "system": None, "bad_rows": "error", "workers": 0, "cache": str(folder / "cache"), "max_prompt_length": 64,
    }  # fmt: skip
    data = PreferenceData(settings.PreferenceData(**{**values, **changes}), TOKENIZER, max_epochs, max_steps, seed)
    data.load()
    return data


def steps_of(data):
    s = data.settings
    return Steps(data.train, s.batch_size, s.micro_batch_tokens, data.total_steps, data.seed)


def test_steps_are_counted_after_packing(tmp_path):
    data = chat_data(tmp_path, chats(tmp_path, [64] * 10))  # ten conversations, two a row: five rows
    assert len(data.train.lengths) == 5
    assert data.total_steps == 2  # two rows a step; the fifth would be half a step
    assert chat_data(tmp_path, chats(tmp_path, [64] * 10), max_epochs=2).total_steps == 5  # ten rows: no half step
    assert chat_data(tmp_path, chats(tmp_path, [64] * 10), max_steps=7).total_steps == 7  # epochs go on as needed


def test_every_step_holds_exactly_the_batch_however_it_is_split(tmp_path):
    data = preference_data(tmp_path, pairs(tmp_path, 11), max_epochs=3)
    steps = steps_of(data)
    assert len(steps) == 33 // 4
    for index in range(len(steps)):
        batches = steps[index]
        assert sum(batch.examples for batch in batches) == 4
        assert all(len(batch.ids) <= 100 for batch in batches)
    assert len(steps[0]) > 1


def test_an_epoch_visits_every_example_once_in_an_order_of_its_own(tmp_path):
    data = preference_data(tmp_path, pairs(tmp_path, 8), max_epochs=3)
    steps = steps_of(data)
    order = [steps._example(position) for position in range(24)]
    epochs = [order[:8], order[8:16], order[16:]]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    torch.manual_seed(99)  # a pure function of seed and step: neither the global state nor the order of asking matters
    again = steps_of(data)
    assert [again._example(position) for position in reversed(range(24))] == order[::-1]


def test_the_loader_goes_on_from_the_saved_position(tmp_path):
    data = preference_data(tmp_path, pairs(tmp_path, 11), max_epochs=3)
    whole = [[batch.ids.tolist() for batch in step] for step in data.train_dataloader()]
    data.load_state_dict({"epoch": 1, "examples": 12, "seed": 0})
    loader = data.train_dataloader()
    assert len(loader) == len(whole)
    assert [[batch.ids.tolist() for batch in step] for step in loader] == whole[3:]


@pytest.mark.parametrize("state", [{"epoch": 0, "examples": 8, "seed": 1}, {"epoch": 0, "examples": 6, "seed": 0}])
def test_another_order_or_batch_cannot_go_on(tmp_path, state):
    with pytest.raises(UserError, match="cannot go on from there"):
        preference_data(tmp_path, pairs(tmp_path, 8)).load_state_dict(state)


def test_labels_survive_the_disk(tmp_path):
    [batch] = steps_of(chat_data(tmp_path, chats(tmp_path, [40, 50]), batch_size=1))[0]
    assert TOKENIZER.decode(batch.targets) in ("a" * (40 - HEADERS - 3) + "</s>" + "a" * (50 - HEADERS - 3) + "</s>",
                                               "a" * (50 - HEADERS - 3) + "</s>" + "a" * (40 - HEADERS - 3) + "</s>")  # fmt: skip
    every = chat_data(tmp_path, chats(tmp_path, [40, 50]), batch_size=1, loss_on="all")
    assert len(steps_of(every)[0][0].targets) == 88  # all but the first token of each


def test_what_is_cut_and_dropped_is_counted(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x" * 200}]},
        {"messages": [{"role": "user", "content": "y" * 200}, {"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}]},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "a <|user|> b"}, {"role": "assistant", "content": "x"}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = chat_data(tmp_path, path, batch_size=1).train.report
    assert (report.rows, report.kept, report.truncated, report.escaped) == (5, 2, 1, 1)
    assert report.tokens_cut == HEADERS + 2 + 200 - 128
    assert report.dropped == {
        "empty assistant turn": 1, "no assistant turn": 1, "no scored token within max_length": 1
    }  # fmt: skip
    assert report.rows == report.kept + sum(report.dropped.values())


def test_pairs_without_a_preference_are_dropped_and_counted(tmp_path):
    def row(chosen, rejected):
        return {"prompt": "hi", "chosen": chosen, "rejected": rejected}

    rows = [row("yes", "no"), row("yes", "yes"), row("", "no"), row("yes", " "), row("z" * 99 + "a", "z" * 99 + "b")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    report = preference_data(tmp_path, path, batch_size=1, max_length=80, max_prompt_length=40).train.report
    assert report.dropped == {
        "identical completions": 1, "empty completion": 2, "completions identical within max_length": 1
    }  # fmt: skip


def test_bad_rows_are_an_error_or_counted(tmp_path):
    path = chats(tmp_path, [40, 50])
    path.write_text(path.read_text() + '{"messages": [{"role": "asistant", "content": "x"}]}\n')
    with pytest.raises(UserError, match=r"chats.jsonl line 3: .*'asistant'.*data.bad_rows=drop"):
        chat_data(tmp_path, path, batch_size=1)
    assert chat_data(tmp_path, path, batch_size=1, bad_rows="drop").train.report.dropped == {"unusable row": 1}


def test_a_file_of_unusable_rows_says_why(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(UserError, match="data.train: none of the 1 rows .* can be used: 1 no assistant turn"):
        chat_data(tmp_path, path)


def test_too_few_examples_for_a_step_say_so(tmp_path):
    with pytest.raises(UserError, match=r"holds 3 pairs, but one optimizer step takes data.batch_size=4"):
        preference_data(tmp_path, pairs(tmp_path, 3))


def test_tokenised_data_is_written_once_and_keyed_by_all_that_matters(tmp_path):
    path = chats(tmp_path, [40, 50])

    def cached():
        return {folder.name for folder in (tmp_path / "cache").iterdir()}

    chat_data(tmp_path, path, batch_size=1)
    [first] = cached()
    stamp = (tmp_path / "cache" / first / "tokens.arrow").stat().st_mtime_ns
    chat_data(tmp_path, path, batch_size=1, micro_batch_tokens=64)  # packing does not touch tokens
    assert cached() == {first}
    assert (tmp_path / "cache" / first / "tokens.arrow").stat().st_mtime_ns == stamp
    for changes in ({"max_length": 64}, {"system": ""}, {"loss_on": "all"}, {"bad_rows": "drop"}):
        before = cached()
        chat_data(tmp_path, path, batch_size=1, **changes)
        assert len(cached()) == len(before) + 1, changes
    before = cached()
    chat_data(tmp_path, chats(tmp_path, [40, 51]), batch_size=1)  # other content under the same name
    assert len(cached()) == len(before) + 1


def test_prompts_come_with_their_answers(tmp_path):
    path = chats(tmp_path, [40, 50])
    data = chat_data(tmp_path, path, batch_size=1, validation=str(path), system="be brief")
    prompts, answers = data.prompts(5)
    assert prompts[1] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "001"}]
    assert answers[1] == "a" * (50 - HEADERS - 3)
    assert chat_data(tmp_path, path, batch_size=1).prompts(5) == ([], [])


def test_the_next_step_is_packed_while_one_trains(tmp_path):
    """One step ahead and no more; what goes wrong in the thread is raised in the loop."""
    data = preference_data(tmp_path, pairs(tmp_path, 11), max_epochs=3)
    loader = data.train_dataloader()
    asked, original = [], loader.dataset.examples.pack
    ahead = threading.Event()

    def pack(examples):
        asked.append(threading.current_thread())
        if len(asked) > 2:
            ahead.set()
            raise ValueError("in the thread")
        return original(examples)

    loader.dataset.examples.pack = pack
    loader.dataset.micro_batch_tokens = 10**6  # one micro-batch a step
    batches = iter(loader)
    next(batches), next(batches)
    assert ahead.wait(10) and threading.main_thread() not in asked  # the third is made before it is asked for
    with pytest.raises(ValueError, match="in the thread"):
        next(batches)
