"""Batched answers against unpadded ones, and a model that is left as it was."""

import pytest
import torch
from transformers import GenerationConfig

from tests import tiny
from zephyr.generation import generate as module
from zephyr.generation.generate import generate, stream
from zephyr.models.attention import SEGMENTS

CHATS = [
    [{"role": "user", "content": "A much longer question than the others, so that they are padded a lot."}],
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "Why not?"},
    ],
]


def sharp(**overrides):
    """A random model whose logits differ so much that rounding cannot change the best token."""
    model = tiny.model(**overrides)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    return model


def ends_after(tokens: list[int]):
    """A model that writes `tokens` and then </s>, whatever the prompt: it looks at the last token alone."""
    model = tiny.model(hidden_size=512, num_attention_heads=4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(258, 512))
        model.lm_head.weight.zero_()
        for before, after in zip([198, *tokens], [*tokens, 256], strict=True):  # 198 is the line break
            model.lm_head.weight[after, before] = 10.0
    return model


def plain_greedy(model, tokenizer, chat, tokens: int) -> str:
    """Arg max of the logits of the whole text, a token at a time: no cache, no padding, no batch."""
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_a_batch_answers_as_each_conversation_alone():
    model, tokenizer = sharp().eval(), tiny.tokenizer()
    expected = [plain_greedy(model, tokenizer, chat, 12) for chat in CHATS]
    assert len(set(expected)) == 3
    assert generate(model, tokenizer, CHATS, 12) == expected
    assert [generate(model, tokenizer, [chat], 12)[0] for chat in CHATS] == expected
    for chat, answer in zip(CHATS, expected, strict=True):
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        assert tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True) == answer


def test_answers_keep_their_order_over_several_batches(monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = sharp(), tiny.tokenizer()
    whole = generate(model, tokenizer, CHATS, 5)
    monkeypatch.setattr(module, "ROWS", 2)
    assert generate(model, tokenizer, CHATS, 5) == whole
    assert generate(model, tokenizer, [], 5) == []


def test_an_answer_ends_at_the_end_of_turn():
    tokenizer = tiny.tokenizer()
    model = ends_after(tokenizer("yes").input_ids)
    assert generate(model, tokenizer, CHATS, 20) == ["yes"] * 3
    assert generate(model, tokenizer, CHATS, 2) == ["ye"] * 3
    assert list("".join(stream(model, tokenizer, CHATS[0], 20, 0.0, 1.0))) == ["y", "e", "s"]


def test_nothing_is_left_behind():
    model, tokenizer = sharp(), tiny.tokenizer()
    model.set_attn_implementation(SEGMENTS)
    model.config.use_cache = False
    model.generation_config = GenerationConfig(repetition_penalty=5.0)  # would change the answers
    model.model.layers[0].eval()  # a part that was frozen
    modes = [part.training for part in model.modules()]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    plain = generate(sharp(), tokenizer, CHATS, 6)
    assert generate(model, tokenizer, CHATS, 6) == plain
    generate(model, tokenizer, CHATS, 6, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)
    list(stream(model, tokenizer, CHATS[0], 6, 0.0, 1.0))
    assert [part.training for part in model.modules()] == modes
    assert model.config._attn_implementation == SEGMENTS
    assert model.generation_config.repetition_penalty == 5.0
    assert model.config.use_cache is False


def test_after_the_prompt_the_model_reads_one_token_at_a_time():
    model, tokenizer = sharp(), tiny.tokenizer()
    model.config.use_cache = False
    widths: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    generate(model, tokenizer, CHATS[1:2], 4)
    assert widths == [27, 1, 1, 1]  # "<|user|>\nHi</s>\n<|assistant|>\n" is 27 tokens


def test_sampling_depends_on_the_seed_alone():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    first = generate(model, tokenizer, CHATS, 8, temperature=1.0, seed=1)
    torch.manual_seed(99)
    assert generate(model, tokenizer, CHATS, 8, temperature=1.0, seed=1) == first
    assert generate(model, tokenizer, CHATS, 8, temperature=1.0, seed=2) != first


def test_a_prompt_beyond_the_window_loses_its_beginning():
    model, tokenizer = sharp(max_position_embeddings=64), tiny.tokenizer()
    seen: list[torch.Tensor] = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    generate(model, tokenizer, CHATS[:1], 10)
    whole = tokenizer.apply_chat_template(CHATS[0], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert seen[0].tolist() == [whole[-54:]]
    assert len(seen) == 10
    seen.clear()
    generate(model, tokenizer, CHATS[:1], 1000)  # half the window is the answer's
    assert seen[0].shape == (1, 32)
    assert len(seen) <= 32


def test_an_adapter_answers_as_its_merged_model():
    peft = pytest.importorskip("peft")
    tokenizer, base = tiny.tokenizer(), sharp()
    alone = generate(base, tokenizer, CHATS, 6)
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    policy = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    policy.set_attn_implementation(SEGMENTS)
    answers = generate(policy, tokenizer, CHATS, 6)
    assert policy.config._attn_implementation == SEGMENTS
    assert answers != alone
    policy.set_attn_implementation("sdpa")
    assert answers == generate(policy.merge_and_unload(), tokenizer, CHATS, 6)


def test_a_stream_says_what_generate_says_and_can_be_closed():
    model, tokenizer = sharp(), tiny.tokenizer()
    answer = generate(model, tokenizer, CHATS, 12)[2]
    assert "".join(stream(model, tokenizer, CHATS[2], 12, 0.0, 1.0)) == answer
    steps: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda *_: steps.append(1))
    chunks = stream(model, tokenizer, CHATS[2], 200, 0.0, 1.0)
    next(chunks)
    chunks.close()
    assert len(steps) < 200
    assert model.training


def test_a_failure_while_streaming_reaches_the_reader(monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = tiny.model(), tiny.tokenizer()

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream(model, tokenizer, CHATS[0], 5, 0.0, 1.0))
    assert model.training
