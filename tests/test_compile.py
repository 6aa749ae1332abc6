"""Compiled layers: one graph for every length, without breaks, and the numbers of the plain ones."""

import copy
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from tests import tiny
from tests.test_parity import dpo_task, one_step, perturbed, random_pairs
from zephyr.data.batch import IDLE, pack_pairs
from zephyr.models import decoder
from zephyr.models.adapters import attach
from zephyr.models.attention import SEGMENTS
from zephyr.models.policy import Placement, load_policy
from zephyr.models.reference import AdapterOff
from zephyr.training import optimizer


@contextmanager
def counted(backend):
    """Inside, compilation begins anew and is counted, and a break in a graph is an error."""
    torch._dynamo.reset()
    decoder._compiled.cache_clear()
    counter = CompileCounterWithBackend(backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
        yield counter
    decoder._compiled.cache_clear()


@pytest.fixture(scope="module")
def graphs():
    """Graphs as they are traced and differentiated, run without generated code, which takes seconds each."""
    with counted("aot_eager") as counter:
        yield counter


def models(lora, checkpointing, compiled):
    """A task over the policy, and the same policy to look at."""
    reference = tiny.model(0)
    policy = perturbed(reference)
    core = policy
    if lora:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            policy = attach(policy, tiny.lora(4, modules=["q_proj", "down_proj"]), None, dtype=torch.float32)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(7))
    task = dpo_task(reference, core)
    if lora:
        task.policy, task.reference = policy.train(), AdapterOff(False)
    assert decoder.rewrite(core, checkpointing, compiled)
    return task


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_compiled_steps_equal_plain_ones_and_lengths_compile_nothing_new(graphs, lora):
    """Each kind of checkpointing to 1e-5; then twenty more rows, all of them of other lengths."""
    start = graphs.frame_count
    for checkpointing in ("none", "selective", "full"):
        values, gradients = one_step(models(lora, checkpointing, True), random_pairs(2))
        truth, true_gradients = one_step(models(lora, checkpointing, False), random_pairs(2))
        assert values == pytest.approx(truth, rel=1e-5, abs=1e-6)
        assert_near(gradients, true_gradients)
    before, lengths = graphs.frame_count, set()
    assert before > start
    task = models(lora, "none", True)
    for seed in range(22):
        batch = pack_pairs(random_pairs(1 + seed % 3, seed=seed))
        if seed == 1:
            before = graphs.frame_count  # another model with adapters has graphs of its own
        lengths.add(len(batch.ids))
        task.loss(batch)[0].backward()
    assert len(lengths) >= 18
    assert graphs.frame_count == before


def test_an_idle_row_of_one_token_compiles_once(graphs):
    """One token is special to the compiler; it may cost graphs once, never an error."""
    task = models(False, "none", True)
    task.loss(pack_pairs(random_pairs(1)))[0].backward()
    task.loss(IDLE)[0].backward()
    count = graphs.frame_count
    task.loss(IDLE)[0].backward()
    task.loss(pack_pairs(random_pairs(2)))[0].backward()
    assert graphs.frame_count == count


def test_a_frozen_copy_compiles(graphs, tmp_path):
    start = tiny.model(0)
    start.save_pretrained(tmp_path)
    placement = Placement(torch.device("cpu"), "32-true", compile=True)
    frozen = load_policy(str(tmp_path), None, tiny.model_settings(), placement, frozen=True)
    batch = pack_pairs(random_pairs(2))
    task = dpo_task(frozen, copy.deepcopy(start))
    with torch.no_grad():
        found = task.sequence_logps(frozen, batch)
        assert frozen.model.layers[0].forward.args[3] is decoder._compiled(decoder.before)
        start.set_attn_implementation(SEGMENTS)
        truth = task.sequence_logps(start, batch)
    assert_close(found, truth, rtol=1e-5, atol=1e-5)


def test_generated_code_gives_the_same_numbers():
    """Once through inductor, to the gradients."""
    with counted("inductor") as counter:
        values, gradients = one_step(models(False, "none", True), random_pairs(2))
        truth, true_gradients = one_step(models(False, "none", False), random_pairs(2))
    assert counter.frame_count > 0
    assert values == pytest.approx(truth, rel=1e-5, abs=1e-6)
    assert_near(gradients, true_gradients)


def assert_near(gradients, truth):
    trained = {name: g for name, g in truth.items() if g is not None}
    assert trained.keys() == {name for name, g in gradients.items() if g is not None}
    for name, g in trained.items():
        assert (gradients[name] - g).norm() <= 1e-5 * g.norm() + 1e-9, name


@pytest.mark.parametrize("eight_bits", [True, False])
def test_the_lean_optimizer_compiles_in_a_graph_or_two(monkeypatch, eight_bits):
    """Neither sizes nor steps make new ones; what it does is the same to the last bit."""
    with counted("aot_eager") as counter:
        compiled = torch.compile(optimizer._advance)
    found = []
    for advance in (compiled, optimizer._advance):
        monkeypatch.setattr(optimizer, "_advance_on", lambda *_, advance=advance: advance)
        own = [
            torch.nn.Parameter(torch.linspace(-1, 1, rows * 256).view(rows, 256).bfloat16()) for rows in (16, 40, 24)
        ]
        stepping = optimizer.LeanAdamW(own, 1e-3, (0.9, 0.999), 1e-8, 0.1, eight_bits=eight_bits)
        for step in range(4):
            for p in own:
                p.grad = torch.full_like(p, 0.1 * (step + 1))
            stepping.step()
        found.append(own)
    assert counter.frame_count <= 3
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))
