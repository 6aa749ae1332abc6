"""An adapter and its base made one model, as a command."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.test_adapters import SFT, by_hand, core, logits, trained
from tests.test_export import CARD
from zephyr import merge
from zephyr.errors import UserError
from zephyr.export import export
from zephyr.models.adapters import DEFAULT, attach

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A base, and an adapter trained on it in 4 bits, whole, and as a DoRA in 4 bits."""
    folder = tmp_path_factory.mktemp("merge")
    export(tiny.model(0), tiny.tokenizer(), folder / "base", CARD)
    for name, quantization, lora in (
        ("nf4", "nf4", SFT),
        ("whole", None, SFT),
        ("dora", "nf4", replace(SFT, dora=True)),
    ):
        export(policy(folder, quantization, lora), tiny.tokenizer(), folder / name / "model", CARD)
    return folder


def policy(folder: Path, quantization: str | None, lora=SFT, dtype=torch.float32):
    return trained(attach(core(folder / "base", quantization, dtype), lora, None, dtype=torch.float32))


def plain(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def refusal(capsys, *arguments: object) -> str:
    assert merge.main([*map(str, arguments)]) == 2
    out, message = capsys.readouterr()
    assert out == "" and len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("name", ["nf4", "dora", "whole"])
def test_by_default_the_model_that_trained_comes_out(world: Path, tmp_path: Path, capsys, name):
    quantization = None if name == "whole" else "nf4"
    as_trained = policy(world, quantization, replace(SFT, dora=name == "dora"))
    assert merge.main([str(world / name), str(tmp_path / "merged"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    merged = plain(tmp_path / "merged")
    assert (logits(merged) - logits(as_trained)).abs().max() < 1e-6
    if name != "dora":
        expected = by_hand(world / "base", as_trained, quantization, {DEFAULT: 8 / 4}).state_dict()
        torch.testing.assert_close(merged.state_dict(), expected, rtol=0, atol=1e-7)
    most = float(re.search(r"at most (\S+) and on average", said)[1])
    assert most < 1e-6 and "tokens of 4 short conversations" in said
    assert not (tmp_path / "merged/adapter_config.json").exists()
    assert "peft" not in (tmp_path / "merged/README.md").read_text().split("## Versions")[0]


def test_the_base_as_stored_makes_another_model_and_the_card_says_how_far(world: Path, tmp_path: Path):
    difference = merge.merge(str(world / "nf4"), tmp_path / "merged", "bf16", "cpu")
    expected = by_hand(world / "base", policy(world, "nf4"), None, {DEFAULT: 8 / 4})
    merged = plain(tmp_path / "merged")
    torch.testing.assert_close(merged.state_dict(), expected.state_dict(), rtol=0, atol=1e-7)

    tokenizer, as_trained = AutoTokenizer.from_pretrained(tmp_path / "merged"), policy(world, "nf4").eval()
    apart = []
    for question, answer in merge._CHATS:
        text = f"<|user|>\n{question}</s>\n<|assistant|>\n{answer}</s>\n"
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            apart.append((merged.eval()(ids).logits - as_trained(ids).logits)[0].abs())
    apart = torch.cat(apart)
    assert difference.tokens == len(apart)
    assert difference.most == pytest.approx(apart.max().item(), rel=1e-3) and difference.most > 0.01
    assert difference.mean == pytest.approx(apart.mean().item(), rel=1e-3)

    card = (tmp_path / "merged/README.md").read_text()
    section = " ".join(card.split("## Merged weights\n")[1].split("\n## Use")[0].split())
    assert f"at most {difference.most:.2g} and on average {difference.mean:.2g} nats" in section
    assert f"at the {difference.tokens} tokens" in section and "not quite the model that trained" in section
    assert "## Adapter" not in card and "| learning rate | 5e-07 |" in card
    assert "library_name: transformers\n" in card and "base_model_relation: finetune\n" in card


def test_weights_are_stored_in_the_dtype_of_training(world: Path, tmp_path: Path):
    export(policy(world, "nf4", dtype=torch.bfloat16), tiny.tokenizer(), tmp_path / "adapter", CARD)
    difference = merge.merge(str(tmp_path / "adapter"), tmp_path / "merged", device="cpu")
    assert plain(tmp_path / "merged").dtype == torch.bfloat16
    assert 0 < difference.most < 0.02 and "is the model that trained, to rounding" in " ".join(
        (tmp_path / "merged/README.md").read_text().split()
    )


def test_an_adapter_from_elsewhere(world: Path, tmp_path: Path):
    """Without our record, card or tokenizer."""
    model = peft.get_peft_model(core(world / "base"), peft.LoraConfig(target_modules=["q_proj"], use_rslora=True))
    trained(model).save_pretrained(tmp_path / "foreign")
    (tmp_path / "foreign/README.md").unlink()
    merge.merge(str(tmp_path / "foreign"), tmp_path / "merged")
    assert (logits(plain(tmp_path / "merged")) - logits(model)).abs().max() < 1e-6
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tiny.tokenizer().chat_template
    assert "## Merged weights" in (tmp_path / "merged/README.md").read_text()


def test_mistakes_are_one_message(world: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert "neither a folder here nor an adapter's hub id" in refusal(capsys, tmp_path / "nowhere", out)
    assert "holds a whole model: there is nothing to merge" in refusal(capsys, world / "base", out)
    assert "has no adapter_config.json" in refusal(capsys, world, out)
    assert "exists already" in refusal(capsys, world / "nf4", world)
    assert "held in 4 bits in training. Leave out --base" in refusal(
        capsys, world / "whole", out, "--base", "dequantised"
    )

    adapter = tmp_path / "adapter"
    shutil.copytree(world / "nf4/model", adapter)
    shutil.copytree(world / "base", tmp_path / "base")
    config = json.loads((adapter / "adapter_config.json").read_text())

    def on(base: Path | str) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))

    on(tmp_path / "gone")
    assert re.search(r"gone, does not exist. If it has moved, .*adapter_config.json", refusal(capsys, adapter, out))
    on("no/such")
    assert "Cannot load the base of this adapter, no/such" in refusal(capsys, adapter, out)
    on(tmp_path / "base")
    weights = load_file(tmp_path / "base/model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    assert re.search(r"weights in .*base have changed since", refusal(capsys, adapter, out))
    assert not out.exists()


def test_mistakes_are_found_before_anything_is_loaded(world: Path):
    code = "import sys; from zephyr import merge; print(merge.main(sys.argv[1:]), 'torch' in sys.modules)"
    line = [sys.executable, "-c", code, str(world / "base"), str(world / "out")]
    assert subprocess.run(line, capture_output=True, text=True).stdout == "2 False\n"
    done = subprocess.run([sys.executable, "-m", "zephyr.merge"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: python -m zephyr.merge")


def test_a_base_stored_in_four_bits_is_refused(world: Path, tmp_path: Path):
    core(world / "base", "nf4").save_pretrained(tmp_path / "packed")
    attached = attach(core(tmp_path / "packed"), SFT, None, dtype=torch.float32)
    export(attached, tiny.tokenizer(), tmp_path / "adapter", CARD)
    with pytest.raises(UserError, match="packed, is stored in 4 bits"):
        merge.merge(str(tmp_path / "adapter"), tmp_path / "out", device="cpu")


def test_what_is_damaged_is_named(world: Path, tmp_path: Path):
    shutil.copytree(world / "whole/model", tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="Cannot read the adapter's weights"):
        merge.merge(str(tmp_path / "adapter"), tmp_path / "out")
