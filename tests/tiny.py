"""The smallest tokenizer and model with which every code path still runs; nothing is downloaded."""

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from zephyr import settings
from zephyr.data.render import control_tokens, template

EOS, PAD = "</s>", "<pad>"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (256 of them), then </s> (256) and <pad> (257); Zephyr's chat template, no BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(EOS, normalized=False), AddedToken(PAD, normalized=False)])
    tiny = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=PAD)
    tiny.chat_template = template(control_tokens(tiny))
    return tiny


def model(seed: int = 0, **overrides: Any) -> MistralForCausalLM:
    """A random two-layer Mistral in fp32 and training mode; `overrides` go to its config."""
    config = MistralConfig(
        **{
            "vocab_size": 258,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": 256,
            "pad_token_id": 257,
            "tie_word_embeddings": False,
            **overrides,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MistralForCausalLM(config).train()


def objective(name: str = "sigmoid", beta: float = 0.1, **changes: Any) -> settings.Objective:
    """An objective without modifiers, but for `changes`; keys that are no field are the function's own."""
    plain = {"divergence": "reverse_kl", "divergence_alpha": 0.5, "weighting": None, "ld_alpha": 1.0, "nll_weight": 0.0}
    own = {key: value for key, value in changes.items() if key not in plain}
    common = {key: changes.get(key, value) for key, value in plain.items()}
    return settings.Objective(name=name, beta=beta, options=own, **common)


def lora(
    rank: int = 4, alpha: float = 8.0, dropout: float = 0.0, modules: Any = "all-linear", **kinds: bool
) -> settings.Lora:
    """A plain adapter, but for `kinds` (dora, rslora)."""
    return settings.Lora(rank, alpha, dropout, modules, kinds.get("dora", False), kinds.get("rslora", False))


def model_settings(
    adapter: settings.Lora | None = None, quantization: str | None = None, checkpointing: str = "none"
) -> settings.Model:
    """How to hold a policy; the paths are not read by what loads it."""
    return settings.Model(None, None, "base", None, adapter, quantization, False, False, checkpointing)  # type: ignore[arg-type]
