"""The demo's base model: a byte-level tokenizer and an untrained Mistral of about a million parameters."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

PIECES = r"\d|<\|(?:system|user|assistant)\|>|'s\b| ?\p{L}+| ?[^\s\p{L}\d]+|\s"
SPECIAL = ("<unk>", "<s>", "</s>")
VOCABULARY = 1024


def write_base(folder: Path, chats: Iterable[list[dict[str, str]]]) -> None:
    """Write a folder that plain transformers loads, its tokenizer trained on `chats`."""
    tokenizer = train_tokenizer(chats)
    tokenizer.save_pretrained(folder)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MistralForCausalLM(config).save_pretrained(folder)


def train_tokenizer(chats: Iterable[list[dict[str, str]]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text round-trips; newlines and digits stay single, a role marker is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(chats), trainer)
    unk, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def _texts(chats: Iterable[list[dict[str, str]]]) -> Iterator[str]:
    for messages in chats:
        yield from (f"<|{message['role']}|>\n{message['content']}" for message in messages)
        yield "<|system|>\n"
