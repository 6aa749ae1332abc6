"""Tokenising in one process and in several: the same files, the same messages, and nothing half-written."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests import dying, tiny
from tests.commands import ROOT
from zephyr.data import encode, pool, sources, tokenised
from zephyr.data.encode import Options
from zephyr.data.render import chat_format
from zephyr.errors import UserError

TOKENIZER = tiny.tokenizer()
OPTIONS = Options(64, 32, False, None, 0, False)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight rows a piece, and a pool from two pieces on."""
    monkeypatch.setattr(sources, "_CHUNK_ROWS", 8)
    monkeypatch.setattr(encode, "_POOL_FROM", 2)


def chat(number: int) -> dict:
    return {
        "messages": [
            {"role": "user", "content": f"{number}? </s>" if number % 5 == 0 else f"{number}?"},
            {"role": "assistant", "content": "é" * (number % 40 + 1)},
        ]
    }


def lines(*rows: dict) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def conversations(path: Path, cache: Path, options: Options = OPTIONS) -> tuple[tokenised.Table, tokenised.Report]:
    return tokenised.tokenised_conversations(str(path), "data.train", TOKENIZER, options, cache)


roles = st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1, max_size=5)
texts = (
    st.text(max_size=30)
    | st.text(alphabet=" <|>/sune\nardytm", max_size=30)
    | st.sampled_from(["</s>", "<<|user|>|user|>"])
)


@hypothesis_settings(max_examples=300, deadline=None)
@given(roles.flatmap(lambda names: st.tuples(*(st.tuples(st.just(name), texts) for name in names))), st.booleans())
def test_the_text_is_the_templates(turns: tuple[tuple[str, str], ...], opening: bool):
    """The exported Jinja template, run by transformers, is the truth: its text, ids and assistant's tokens."""
    messages = [{"role": role, "content": text} for role, text in turns]
    encoder = chat_format(TOKENIZER).encoder()
    text, spans = encoder.text(messages, opening)
    assert text == TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening)
    if not opening:
        truth = TOKENIZER.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        [encoding] = encoder.encode([text])
        assert encoding.ids == truth["input_ids"]
        assert encode.spoken(encoding, spans).tolist() == truth["assistant_masks"]


def test_the_number_of_processes_changes_no_byte(tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(lines(*map(chat, range(60))) + b"\n" + lines(*map(chat, range(60, 70))))
    written = {}
    for processes in (1, 2, 3):
        monkeypatch.setattr(encode, "cores", lambda processes=processes: processes)
        table, report = conversations(path, tmp_path / str(processes))
        [folder] = (tmp_path / str(processes)).iterdir()
        written[processes] = [(folder / name).read_bytes() for name in ("tokens.arrow", "report.json")]
        assert (len(table), report.rows, report.escaped) == (70, 70, 14)
        ids = TOKENIZER.apply_chat_template(chat(9)["messages"], return_dict=True)["input_ids"]
        assert table.row("ids", 9) == ids[:64]
    assert written[1] == written[2] == written[3]


def test_pairs_in_several_processes(tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(lines(*({"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": "no"} for n in range(40))))
    monkeypatch.setattr(encode, "cores", lambda: 2)
    table, report = tokenised.tokenised_pairs(str(path), "data.train", TOKENIZER, OPTIONS, tmp_path / "cache")
    assert report.kept == 40
    assert [TOKENIZER.decode(table.row(name, 33)) for name in ("prompt", "chosen", "rejected")] == [
        "<|user|>\n33?</s>\n<|assistant|>\n",
        "yes 33</s>",
        "no</s>",
    ]


BAD = b'{"messages": [{"role": "asistant", "content": "x"}]}\n'
FAULTS = {
    "the first of two": (
        lines(*map(chat, range(20))) + BAD + lines(*map(chat, range(20))) + b"{\n",
        "line 21: messages",
    ),
    "JSON first": (lines(*map(chat, range(20))) + b"{\n" + lines(*map(chat, range(20))) + BAD, "line 21: invalid JSON"),
    "a row before damage": (BAD, "line 1: messages"),
    "damage": (b"", "is not a complete gzip file"),
}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_fault_is_named_and_nothing_stays(
    fault: str, processes: int, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
):
    content, words = FAULTS[fault]
    path = tmp_path / "chats.jsonl"
    if "damage" in fault:  # the file is cut off, long after the first pieces
        path = path.with_suffix(".jsonl.gz")
        noise = lines(*({**chat(n), "id": os.urandom(99).hex()} for n in range(400)))
        content = gzip.compress(content + noise)[:-9000]
    path.write_bytes(content)
    monkeypatch.setattr(encode, "cores", lambda: processes)
    with pytest.raises(UserError, match=words):
        conversations(path, tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


def test_bad_rows_are_counted_over_all_pieces(tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "chats.jsonl"
    path.write_bytes((BAD + lines(*map(chat, range(9)))) * 4)
    monkeypatch.setattr(encode, "cores", lambda: 2)
    _, report = conversations(path, tmp_path / "cache", OPTIONS._replace(drop_bad_rows=True))
    assert (report.rows, report.kept, report.dropped) == (40, 36, {"unusable row": 4})


def test_a_line_that_is_no_json_is_a_bad_row_too(tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(lines(*map(chat, range(9))) + b"{\n[]\n" + lines(chat(9)))
    _, report = conversations(path, tmp_path / "cache", OPTIONS._replace(drop_bad_rows=True))
    assert (report.rows, report.kept, report.dropped) == (12, 10, {"unusable row": 2})
    with pytest.raises(UserError, match="chats.jsonl line 10: invalid JSON .*or set data.bad_rows=drop"):
        conversations(path, tmp_path / "cache")


def test_a_small_file_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(lines(*map(chat, range(600))))
    monkeypatch.setattr(encode, "cores", lambda: 8)
    monkeypatch.setattr(pool, "ProcessPoolExecutor", lambda *_: pytest.fail("a process was started"))
    assert len(conversations(path, tmp_path / "cache")[0]) == 600


def test_a_killed_process_of_the_pool_is_said(tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(lines(*map(chat, range(60))))
    monkeypatch.setattr(encode, "cores", lambda: 2)
    monkeypatch.setattr(encode, "_alone", dying.worker)
    with pytest.raises(UserError, match="A process that tokenises the data was killed"):
        conversations(path, tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


KILLED = """
import sys
from pathlib import Path

if __name__ == "__main__":
    from tests import test_tokenised as t
    from zephyr.data import encode
    encode.cores = lambda: 2
    t.conversations(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_kill_leaves_nothing_that_counts_and_no_process(tmp_path: Path):
    path, cache, script = tmp_path / "chats.jsonl", tmp_path / "cache", tmp_path / "killed.py"
    path.write_bytes(lines(*map(chat, range(1000))) * 40)
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ZEPHYR_MARK": str(tmp_path)}
    process = subprocess.Popen([sys.executable, script, path, cache], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size > 10_000 for file in cache.glob(".tmp-*/tokens.arrow")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [folder.name[:5] for folder in cache.iterdir()] == [".tmp-"]

    def alive() -> list[Path]:
        found = []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                found += [entry] if str(tmp_path).encode() in entry.read_bytes() else []
        return found

    while alive():
        assert time.monotonic() < deadline + 30, alive()
        time.sleep(0.1)


def test_labels_and_ids_have_no_copy_of_python_numbers(tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(lines(chat(3)))
    [done] = encode.encoded(sources.chunks([path]), encode.ConversationRows, chat_format(TOKENIZER), OPTIONS, 1)
    assert [(column[1].dtype, column[0].tolist()) for column in done.columns] == [
        (np.dtype("int32"), [len(done.columns[0][1])]),
        (np.dtype("uint8"), [len(done.columns[0][1])]),
    ]
