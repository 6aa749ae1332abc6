"""What a dry run prints, against figures worked by hand."""

import re
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.test_conf import load
from zephyr.errors import UserError
from zephyr.planning.dry_run import report
from zephyr.planning.simulate import Peak
from zephyr.settings import parse

WEIGHTS = 7_241_732_096  # of Mistral-7B-v0.1, as its model card has it


def dry(*overrides: str) -> str:
    return report(parse(load(*overrides)))


@pytest.fixture
def no_simulation(monkeypatch):
    """Memory takes seconds to find out and is another test's; here are 1, 2, ... GiB of the seven parts."""
    monkeypatch.setattr("zephyr.planning.dry_run.peak", lambda run: Peak(*(i * 2.0**30 for i in range(1, 8))))


def gib(text: str, part: str) -> float:
    found = re.search(rf"^  {part} +([\d.]+) GiB", text, re.M)
    return float(found[1]) if found else 0.0


def test_the_papers_dpo_on_eight_devices():
    """fp32 weights, and two fp32 moments, over eight; the reference in bf16; 61,135 x 3 / 32 steps."""
    paper = ("recipe=zephyr-7b-beta", "stage=dpo", "trainer=fsdp", "trainer.devices=8")
    assert "reference     precomputed" in dry(*paper)  # pairs are met three times
    text = dry(*paper, "reference=copy")
    assert f"{WEIGHTS:,}" in text and "fsdp on 8 devices" in text and "reference     copy" in text
    assert gib(text, "weights") == pytest.approx(WEIGHTS * 4 / 8 / 2**30, abs=0.01)
    assert gib(text, "optimizer") == pytest.approx(WEIGHTS * 8 / 8 / 2**30, abs=0.01)
    assert gib(text, "reference") == pytest.approx(WEIGHTS * 2 / 8 / 2**30, abs=0.01)
    assert "5,731 of 32 pairs" in text and "it fits" in text


def hours(text: str) -> float:
    found = re.search(r"([\d.,]+) hours on", text)
    return float(found[1].replace(",", "")) if found else 0.0


def part(text: str, name: str) -> float:
    """Seconds of a step."""
    found = re.search(rf"{name} ([\d.e-]+) s", text)
    return float(found[1]) if found else 0.0


def test_more_devices_take_less_memory_of_each_and_less_time():
    texts = [dry("recipe=zephyr-7b-beta", "stage=sft", "trainer=fsdp", f"trainer.devices={n}") for n in (4, 16)]
    peaks = [gib(text, "peak") for text in texts]
    assert all(more > fewer for more, fewer in pairwise(peaks))
    assert hours(texts[0]) == pytest.approx(4 * hours(texts[1]), rel=0.05)


def test_auto_shards_what_does_not_fit_and_leaves_the_copy_out_where_it_must():
    whole = dry("recipe=zephyr-7b-beta", "stage=sft")
    assert "one device" in whole and "it does not fit" in whole
    assert "fsdp on 8 devices" in dry("recipe=zephyr-7b-beta", "stage=sft", "trainer.devices=8")
    assert "reference     precomputed" in dry("recipe=zephyr-7b-beta", "stage=dpo", "trainer.devices=1")


def test_a_steps_parts_are_the_step_and_its_steps_are_the_hours(no_simulation):
    text = dry("recipe=zephyr-7b-beta", "stage=sft", "trainer=fsdp", "trainer.devices=8")
    parts = [part(text, name) for name in ("computing", "slowest", "hidden", "optimizer")]
    assert sum(parts) == pytest.approx(part(text, "a step +"), rel=0.01)
    assert hours(text) == pytest.approx(part(text, "a step +") * 271 / 3600, rel=0.01)
    tokens = int(re.search(r"GPU +([\d,]+) tokens/s", text)[1].replace(",", ""))  # type: ignore[index]
    assert tokens == pytest.approx(512 * 2048 / 8 / part(text, "a step +"), rel=0.01)
    assert "about 284,164,096" in text  # 271 x 512 rows of 2048


def test_what_must_take_longer_does(no_simulation):
    base = ("recipe=zephyr-7b-beta", "stage=dpo", "trainer=fsdp", "trainer.devices=8", "reference=copy")
    plain = dry(*base)
    assert hours(plain) > hours(dry(*base, "model.activation_checkpointing=selective"))
    assert hours(dry(*base, "objective=aot")) > 1.2 * hours(plain)  # all log-probabilities come first
    assert hours(dry(*base, "gpu=A100")) > 1.8 * hours(plain)
    assert hours(plain) > hours(dry(*base, "trainer.compile=true"))
    assert "before it" in dry(*base[:-1], "reference=precomputed") and "before it" not in plain


def test_nodes_count(no_simulation):
    """Eight of one: the same devices, but everything crosses the network."""
    one, eight = (dry("recipe=zephyr-7b-beta", "stage=sft", "trainer=fsdp", "trainer.replicas=1", *more) for more in (
        ("trainer.devices=8",), ("trainer.devices=1", "trainer.num_nodes=8")
    ))  # fmt: skip
    assert "fsdp on 8 devices" in eight and part(eight, "hidden") > 2 * part(one, "hidden")


def test_more_processes_than_pairs_are_refused():
    with pytest.raises(UserError, match="data.batch_size=32 cannot be shared out to 64 processes"):
        dry("recipe=zephyr-7b-beta", "stage=dpo", "trainer=fsdp", "trainer.devices=8", "trainer.num_nodes=8")


def test_offloaded_weights_rest_in_the_host(no_simulation):
    """Weights, gradients, reference: 6 GiB; and two moments in fp32 of 7,241,732,096 weights."""
    alone = ("recipe=zephyr-7b-beta", "stage=sft", "trainer=fsdp", "trainer.devices=1")
    kept, offloaded = dry(*alone), dry(*alone, "trainer.cpu_offload=true")
    assert gib(offloaded, "in the host") == pytest.approx(6 + WEIGHTS * 8 / 2**30, abs=0.01)
    assert gib(offloaded, "peak") == 4 + 5 + 6 + 7 and gib(kept, "peak") == pytest.approx(28 + 53.96, abs=0.01)
    assert gib(offloaded, "weights") == 0 and hours(offloaded) > hours(kept)


def test_the_demos_data_is_counted():
    text = dry("stage=sft", "trainer.max_steps=3")
    assert "1,049,728" in text and "3 of 8 packed sequences" in text and "at most" not in text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pairs in two splits, as zephyr.prepare lays them out: 100 to train on, 4 held out."""
    for split, count in (("train", 100), ("test", 4)):
        rows = [{"prompt": f"{n}?", "chosen": f"Yes, {n}!", "rejected": "No."} for n in range(count)]
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"data/{split}_prefs-00000-of-00001.parquet")
    return tmp_path


def test_a_split_of_a_folder_is_counted(folder: Path, no_simulation):
    data = (f"data.train={folder}:train_prefs", f"data.cache={folder}/cache")
    text = dry("stage=dpo", "data.batch_size=10", *data)
    assert "10 of 10 pairs" in text and "at most" not in text and "nothing was counted" not in text
    assert "20 of 10 pairs" in dry("stage=dpo", "data.batch_size=10", "trainer.max_epochs=2", *data)
    with pytest.raises(UserError, match=r"no split 'train'. It has: test_prefs, train_prefs. Or set trainer.max_steps"):
        dry("stage=dpo", f"data.train={folder}:train")


def test_what_is_not_here_is_said_and_a_number_of_steps_does_without(folder: Path, no_simulation):
    for data, words in (
        ("/nowhere/pairs.jsonl", "'/nowhere/pairs.jsonl' does not exist"),
        ("some/set@main:train", "data.train=some/set@main:train is not here to be counted"),
        (f"{folder}:train_prefs", "counted by the tokenizer of mistralai/Mistral-7B-v0.1, which is no folder here"),
    ):
        line = ("recipe=zephyr-7b-beta", "stage=dpo", f"data.train={data}")
        with pytest.raises(UserError, match=re.escape(words)) as mistake:
            dry(*line)
        assert "trainer.max_steps" in str(mistake.value)
        assert "7 of 32 pairs" in (text := dry(*line, "trainer.max_steps=7")) and "nothing was counted" in text


def test_an_unknown_gpu_is_refused():
    with pytest.raises(UserError, match="gpu='H1000' is not known. Did you mean 'H100'?"):
        dry("gpu=H1000")
