"""What a dry run prints, against figures worked by hand."""

import re
from itertools import pairwise

import pytest

from tests.test_conf import load
from zephyr.dry_run import report
from zephyr.errors import UserError
from zephyr.settings import parse

WEIGHTS = 7_241_732_096  # of Mistral-7B-v0.1, as its model card has it


def dry(*overrides: str) -> str:
    return report(parse(load(*overrides)))


def gib(text: str, part: str) -> float:
    found = re.search(rf"^  {part} +([\d.]+) GiB", text, re.M)
    return float(found[1]) if found else 0.0


def test_the_papers_dpo_on_eight_devices():
    """fp32 weights, and two fp32 moments, over eight; the reference in bf16; 61,135 x 3 / 32 steps."""
    text = dry("recipe=zephyr-7b-beta", "stage=dpo", "trainer=fsdp", "trainer.devices=8")
    assert f"{WEIGHTS:,}" in text and "fsdp on 8 devices" in text and "reference     copy" in text
    assert gib(text, "weights") == pytest.approx(WEIGHTS * 4 / 8 / 2**30, abs=0.01)
    assert gib(text, "optimizer") == pytest.approx(WEIGHTS * 8 / 8 / 2**30, abs=0.01)
    assert gib(text, "reference") == pytest.approx(WEIGHTS * 2 / 8 / 2**30, abs=0.01)
    assert "5,731 of 32 pairs" in text and "it fits" in text


def test_more_devices_take_less_memory_of_each_and_less_time():
    texts = [dry("recipe=zephyr-7b-beta", "stage=sft", "trainer=fsdp", f"trainer.devices={n}") for n in (4, 16)]
    peaks = [gib(text, "peak") for text in texts]
    hours = [float(re.search(r"([\d.]+) hours", text)[1]) for text in texts]
    assert all(more > fewer for more, fewer in pairwise(peaks)) and hours[0] == pytest.approx(4 * hours[1], rel=0.05)


def test_auto_shards_what_does_not_fit_and_leaves_the_copy_out_where_it_must():
    whole = dry("recipe=zephyr-7b-beta", "stage=sft")
    assert "one device" in whole and "it does not fit" in whole
    assert "fsdp on 8 devices" in dry("recipe=zephyr-7b-beta", "stage=sft", "trainer.devices=8")
    assert "reference     precomputed" in dry("recipe=zephyr-7b-beta", "stage=dpo", "trainer.devices=1")


def test_the_demos_data_is_counted():
    text = dry("stage=sft", "trainer.max_steps=3")
    assert "1,049,728" in text and "3 of 8 packed sequences" in text and "at most" not in text


def test_an_unknown_gpu_is_refused():
    with pytest.raises(UserError, match="gpu='H1000' is not known. Did you mean 'H100'?"):
        dry("gpu=H1000")
