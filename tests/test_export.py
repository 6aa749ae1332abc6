"""What is written loads with plain transformers or PEFT, and says the same as before."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests import tiny
from zephyr.export import Card, export, model_card
from zephyr.models.attention import SEGMENTS

IDS = torch.arange(60)[None]
CARD = Card(
    name="tiny-dpo",
    stage="dpo",
    base_model="mistralai/Mistral-7B-v0.1",
    base_revision="abc123",
    datasets=["HuggingFaceH4/ultrafeedback_binarized", "pairs.jsonl"],
    fingerprints={"train": "0f1e2d3c"},
    training={"learning rate": 5e-7, "pairs a step": 32, "note": "a|b\nc"},
    metrics={"train/loss": 0.5, "eval/loss": 0.625, "eval/rewards/margins": float("nan")},
    license="apache-2.0",
)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained():
    """A model as the trainer holds it: attention over segments, no cache, odd generation settings."""
    model = tiny.model(seed=1)
    model.set_attn_implementation(SEGMENTS)
    model.config.use_cache = False
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.3)  # cannot be saved
    return model


def adapted(base: Path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(base)
    policy = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    return policy


def test_a_full_model_reloads_bit_for_bit(tmp_path: Path):
    model = trained()
    export(model, tiny.tokenizer(), tmp_path / "model", CARD)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.config.use_cache is True and loaded.generation_config.use_cache is not False
    assert loaded.config.architectures == ["MistralForCausalLM"]
    assert torch.equal(logits(loaded), logits(tiny.model(seed=1)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    settings = json.loads((tmp_path / "model/generation_config.json").read_text())
    assert (settings["eos_token_id"], settings["pad_token_id"], settings["max_new_tokens"]) == (256, 257, 256)
    assert (settings["do_sample"], settings["temperature"], settings["top_p"]) == (True, 0.7, 0.95)


def test_the_policy_can_train_on(tmp_path: Path):
    model = trained()
    export(model, tiny.tokenizer(), tmp_path / "model", CARD, dtype=torch.bfloat16)
    assert model.config._attn_implementation == SEGMENTS and model.config.use_cache is False
    assert model.generation_config.temperature == 0.3
    assert model.training and model.dtype == torch.float32


def test_the_dtype_asked_for_is_stored_and_loaded(tmp_path: Path):
    export(trained(), tiny.tokenizer(), tmp_path / "model", CARD, dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    weights = loaded.state_dict()
    for name, weight in tiny.model(seed=1).state_dict().items():
        assert torch.equal(weights[name], weight.to(torch.bfloat16)), name


def test_a_gathered_state_is_what_is_written(tmp_path: Path):
    other = {name: weight.clone() for name, weight in tiny.model(seed=2).state_dict().items()}
    export(trained(), tiny.tokenizer(), tmp_path / "model", CARD, state_dict=other)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(tiny.model(seed=2)))


def test_tied_embeddings_are_written_once(tmp_path: Path):
    model = tiny.model(tie_word_embeddings=True)
    export(model, tiny.tokenizer(), tmp_path / "model", CARD, dtype=torch.bfloat16)
    assert "lm_head.weight" not in load_file(tmp_path / "model/model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight.to(torch.bfloat16))


def test_the_tokenizer_writes_the_same_chat(tmp_path: Path):
    tokenizer = tiny.tokenizer()
    export(trained(), tokenizer, tmp_path / "model", CARD)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (tmp_path / "model/chat_template.jinja").is_file()
    chat = [{"role": "user", "content": "Hi"}]
    text = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>\nHi</s>\n<|assistant|>\n"
    assert loaded(text).input_ids == tokenizer(text).input_ids


def test_an_adapter_reloads_with_peft_and_with_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    export(tiny.model(seed=3), tiny.tokenizer(), tmp_path / "base", CARD)
    monkeypatch.chdir(tmp_path)
    policy = adapted(Path("base"))
    export(policy, tiny.tokenizer(), tmp_path / "model", CARD)
    settings = json.loads((tmp_path / "model/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")  # wherever it is loaded from
    assert not (tmp_path / "model/model.safetensors").exists()
    assert settings["inference_mode"] is True and policy.peft_config["default"].inference_mode is False

    from peft import PeftModel

    monkeypatch.chdir("/")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "model")
    assert torch.equal(logits(loaded), logits(policy))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(policy))
    assert not torch.equal(logits(policy), logits(tiny.model(seed=3)))
    assert ModelCard.load(tmp_path / "model/README.md").data.base_model_relation == "adapter"


def test_an_adapter_is_stored_in_the_dtype_asked_for(tmp_path: Path):
    export(tiny.model(seed=3), tiny.tokenizer(), tmp_path / "base", CARD)
    policy = adapted(tmp_path / "base")
    export(policy, tiny.tokenizer(), tmp_path / "model", CARD, dtype=torch.bfloat16)
    weights = load_file(tmp_path / "model/adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B"
    assert len(weights) == 2 * 2
    assert torch.equal(weights[f"{name}.weight"], policy.get_parameter(f"{name}.default.weight").to(torch.bfloat16))


def test_an_adapters_card_tells_of_the_base_below_it():
    text, bits = (model_card(CARD, adapter=True, quantization=kind).text for kind in (None, "nf4"))
    assert "python -m zephyr.merge PATH FOLDER\n```\n\n## Use" in text and "4 bits" not in text
    assert "held in 4 bits (NF4)" in bits and "## Adapter" not in model_card(CARD).text


def test_the_card_can_be_searched_and_read(tmp_path: Path):
    export(trained(), tiny.tokenizer(), tmp_path / "model", CARD)
    card = ModelCard.load(tmp_path / "model/README.md")
    assert card.data.base_model == "mistralai/Mistral-7B-v0.1"
    assert card.data.datasets == ["HuggingFaceH4/ultrafeedback_binarized"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.tags == ["zephyr", "dpo", "alignment"]
    assert card.data.license == "apache-2.0"
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("loss", 0.625)]  # without nan
    lines = [
        "| learning rate | 5e-07 |",
        "| note | a\\|b c |",
        "| train | 0f1e2d3c |",
        "| eval/loss | 0.625 |",
    ]
    assert set(lines) <= set(card.text.splitlines())
    assert "revision `abc123`" in card.text and "pairs.jsonl" in card.text


def test_a_private_model_names_no_folder_in_its_metadata(tmp_path: Path):
    card = CARD._replace(base_model=str(tmp_path), datasets=["pairs.jsonl"], license=None, base_revision=None)
    export(trained(), tiny.tokenizer(), tmp_path / "model", card)
    data = ModelCard.load(tmp_path / "model/README.md").data
    assert (data.base_model, data.datasets, data.license) == (None, None, None)


def test_the_snippet_of_the_card_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    export(trained(), tiny.tokenizer(), tmp_path / "model", CARD)
    snippet = (tmp_path / "model/README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(snippet.replace("PATH", str(tmp_path / "model")), {})
    assert capsys.readouterr().out


def test_the_old_folder_goes_when_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").touch()
    tokenizer = tiny.tokenizer()

    def full(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", full)
        with pytest.raises(OSError, match="disk full"):
            export(trained(), tokenizer, folder, CARD)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/old"]
    export(trained(), tokenizer, folder, CARD)
    assert not (folder / "old").exists() and (folder / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
