import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zephyr.data.sources import BadRow, conversation, files, preference, read
from zephyr.errors import UserError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ROWS = [{"messages": CHAT}, {"messages": CHAT[:1]}]


def write(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".jsonl"):
        path.write_text(lines)
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name.endswith(".json"):
        path.write_text(json.dumps(rows))
    elif path.name.endswith(".json.gz"):
        path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    rows = list(read(files(str(path), "data.train")))
    assert [columns for _, columns in rows] == ROWS
    assert rows[1][0] == f"{name} {'line' if 'jsonl' in name else 'row'} 2"


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    write(tmp_path / "b.jsonl", ROWS[1:])
    write(tmp_path / "a.parquet", ROWS[:1])
    (tmp_path / "notes.txt").write_text("left alone")
    assert [columns for _, columns in read(files(str(tmp_path), "data.train"))] == ROWS


def test_a_hub_data_set_comes_from_the_hubs_cache(tmp_path, monkeypatch):
    """The layout of ultrachat_200k on the hub, laid out as huggingface_hub keeps a downloaded snapshot."""
    revision = "8049631c405ae6576f93f445c6b8166f76f5505a"
    snapshot = tmp_path / "datasets--HuggingFaceH4--ultrachat_200k" / "snapshots" / revision / "data"
    snapshot.mkdir(parents=True)
    write(snapshot / "train_sft-00000-of-00002-a.parquet", ROWS[:1])
    write(snapshot / "train_sft-00001-of-00002-b.parquet", ROWS[1:])
    write(snapshot / "test_sft-00000-of-00001-c.parquet", [{"messages": []}])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = files(f"HuggingFaceH4/ultrachat_200k@{revision}:train_sft", "data.train")
    assert [columns for _, columns in read(found)] == ROWS
    with pytest.raises(UserError, match="no file of split 'train_gen'"):
        files(f"HuggingFaceH4/ultrachat_200k@{revision}:train_gen", "data.train")
    with pytest.raises(UserError, match=r"data.train: no local path and no reachable hub data set 'a/b@main:train'"):
        files("a/b@main:train", "data.train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"messages": []}\n{"messages": [}\n', r"a.jsonl line 2: invalid JSON \(Expecting value at column 15\)"),
        (b'{"a": 1}\n\n{"a": "\xe9"}\n', r"a.jsonl line 3: not UTF-8 \(byte 0xE9 at 7\)"),
        (b"[1, 2]\n", "a.jsonl line 1: a row must be a JSON object, not list"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
    ],
)
def test_unreadable_lines_are_named(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read([path]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", b"no gzip", "not a complete gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999)[:40], "not a complete gzip file"),
        ("a.parquet", b"no parquet", "not a readable Parquet file"),
        ("a.json", b'{"messages": []}', "must hold a JSON list"),
        ("a.csv", b"a,b", "is none of .jsonl"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read(files(str(tmp_path / name), "data.train")))


def test_a_path_that_does_not_exist_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"data.validation: 'x/uf.jsonl' does not exist .looked in {tmp_path}."):
        files("x/uf.jsonl", "data.validation")


def test_conversations_of_both_ultrachats():
    assert conversation(("r", {"messages": CHAT})) == CHAT
    assert conversation(("r", {"id": "1", "data": ["hi", "hello"]})) == CHAT


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [{"role": "asistant", "content": "x"}],
            r"messages\[0\].role='asistant' is not one of system, user, assistant",
        ),
        ([CHAT[0], CHAT[0]], r"messages\[1\].role is 'user' where 'assistant' is due"),
        ([CHAT[1]], r"messages\[0\].role is 'assistant' where 'user' is due"),
        ([CHAT[0], {"role": "system", "content": ""}], "only the first message may be"),
        ([{"role": "user", "content": None}], r"messages\[0\].content is null, not a text"),
        ([{"role": "user", "text": "x"}], r"messages\[0\] must have the keys role and content"),
        ("hi", "messages is str, not a list"),
        ([], "messages is empty"),
    ],
)
def test_broken_conversations_are_named(messages, message):
    with pytest.raises(BadRow, match=f"^file line 7: .*{message}"):
        conversation(("file line 7", {"messages": messages}))


def test_wrong_columns_name_the_stage_that_fits():
    with pytest.raises(UserError, match="needs the column messages.*found chosen, rejected.*stage=dpo") as error:
        conversation(("r", {"chosen": [], "rejected": []}))
    assert not isinstance(error.value, BadRow)  # the file is wrong, not the row: dropping rows would not help
    with pytest.raises(UserError, match="needs the columns chosen and rejected.*found messages.*stage=sft"):
        preference(("r", {"messages": []}), seed=0)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "no"}], "prompt": "hi"},
        {"chosen": "hello", "rejected": "no", "prompt": "hi"},
        {"chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "no"}], "prompt": CHAT[:1]},
    ],
    ids=["binarised", "texts", "messages"],
)
def test_pairs_of_every_layout(row):
    assert preference(("r", row), seed=0) == (CHAT, [CHAT[0], {"role": "assistant", "content": "no"}])


def test_a_pair_needs_one_prompt():
    other = [{"role": "user", "content": "hey"}, CHAT[1]]
    with pytest.raises(BadRow, match="do not share one prompt"):
        preference(("r", {"chosen": CHAT, "rejected": other}), seed=0)


def completion(response, overall=None, **ratings):
    annotations = {aspect: {"Rating": rating} for aspect, rating in ratings.items()}
    return {"response": response, "annotations": annotations, "overall_score": overall}


def test_raw_feedback_gives_the_best_against_a_seeded_random_other():
    completions = [completion("bad", honesty="1"), completion("best", honesty="5"), completion("fair", honesty="3")]
    completions += [completion("unscored", honesty="N/A"), completion(" ", honesty="4")]
    row = {"instruction": "hi", "completions": completions}
    drawn = [preference(("r", row), seed=seed) for seed in range(40)]
    assert {chosen[-1]["content"] for chosen, _ in drawn} == {"best"}
    assert {rejected[-1]["content"] for _, rejected in drawn} == {"bad", "fair"}
    assert drawn == [preference(("r", row), seed=seed) for seed in range(40)]
    assert drawn[0][0][0] == {"role": "user", "content": "hi"}


def test_raw_feedback_with_fewer_than_two_scores_gives_no_pair():
    row = {"instruction": "hi", "completions": [completion("a", honesty="5"), completion("b")]}
    assert preference(("r", row), seed=0) is None
