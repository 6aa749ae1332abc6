"""AdamW on bf16 weights and with 8-bit state: what is kept, what is drawn, what a checkpoint holds."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

from tests import tiny
from tests.ranks import spawn
from tests.test_parity import ADAMW
from tests.test_task import conversations
from zephyr import distributed
from zephyr.checkpoints.checkpoint import FolderCheckpointIO
from zephyr.checkpoints.shards import change
from zephyr.data.batch import pack_conversations
from zephyr.models.attention import SEGMENTS
from zephyr.running.strategy import _of
from zephyr.sft import SFT
from zephyr.training import optimizer
from zephyr.training.optimizer import LeanAdamW, build

BF16 = torch.bfloat16
COMMON = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}


def parameters(dtype=torch.float32, rows=33):
    """Two matrices of 33 rows, one of which is too small for 8 bits, and a vector."""
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, 256), (rows, 8), (rows,)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(parameters, step, part=slice(None)):
    """A quadratic's, with noise and columns of very different curvature."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in parameters:
        whole = torch.randn((33, *p.shape[1:]), generator=generator)
        slopes = torch.linspace(0.01, 1, p.shape[-1]) ** 4 if p.ndim > 1 else torch.ones(())
        gradient = (whole[part] * 0.3 + p.detach().float() - 0.5) * slopes
        p.grad = gradient.to(p.dtype)


def run(make, steps=30, dtype=torch.float32, start=None):
    own = parameters(dtype) if start is None else start
    stepping = make([{"params": own[:2], "weight_decay": 0.1}, {"params": own[2:]}])
    for step in range(steps):
        give_gradients(own, step)
        stepping.step()
    return own, stepping


def lean(groups, eight_bits=False):
    return LeanAdamW(groups, **COMMON, eight_bits=eight_bits)


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("adamw", torch.float32, "AdamW"),
        ("adamw", BF16, "LeanAdamW"),
        ("adamw_8bit", torch.float32, "LeanAdamW"),
        ("adamw_8bit", BF16, "LeanAdamW"),
        ("paged_adamw_32bit", torch.float32, "PagedAdamW32bit"),
        ("paged_adamw_8bit", torch.float32, "PagedAdamW8bit"),
    ],
)
def test_each_name_is_its_optimizer(name, dtype, kind):
    built = build(replace(ADAMW, name=name), parameters(dtype))
    assert type(built).__name__ == kind
    if kind == "LeanAdamW":
        assert built.eight_bits == (name == "adamw_8bit")


def test_in_fp32_it_is_torchs_adamw():
    found, _ = run(lean)
    truth, _ = run(lambda groups: torch.optim.AdamW(groups, **{**COMMON, "weight_decay": 0.0}))
    for p, q in zip(found, truth, strict=True):
        assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_updates_that_bf16_would_lose_add_up():
    """100 steps of 2^-21 (about DPO's 5e-7) from 1.0 with a constant gradient, by which AdamW moves by the rate.

    Below 1 the next number of bf16 is 2^-8 away, so that one weight in 82 has moved after that: 3200 of 262,144, with
    a standard deviation of 57.
    """
    moved = {}
    for name, make in {"lean": LeanAdamW, "torch": torch.optim.AdamW}.items():
        weights = nn.Parameter(torch.ones(512, 512, dtype=BF16))
        options = {"eight_bits": True} if name == "lean" else {"weight_decay": 0.0}
        stepping = make([weights], lr=2**-21, betas=(0.9, 0.999), eps=1e-12, **options)
        for _ in range(100):
            weights.grad = torch.ones_like(weights)
            stepping.step()
        moved[name] = (1 - weights.detach().double()).mean().item()
    assert moved["torch"] == 0
    assert moved["lean"] == pytest.approx(100 * 2**-21, rel=0.06)


def test_a_number_between_two_of_bf16_goes_to_either_as_often_as_it_is_near():
    """1 + 2^-7 is the neighbour of 1 in bf16; a quarter of the way there, one number in four goes up."""
    lots = optimizer._lots(torch.arange(2**16), torch.tensor(12345))
    for sign in (1.0, -1.0):
        rounded = optimizer._by_lot(torch.full((2**16,), sign * (1 + 2**-9)), lots).float() * sign
        assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
        assert (rounded > 1).float().mean().item() == pytest.approx(0.25, abs=0.01)
        assert (optimizer._by_lot(torch.full((2**16,), sign * 1.5), lots) == sign * 1.5).all()


def test_lots_are_even_and_differ_from_step_to_step():
    one, other = (optimizer._lots(torch.arange(2**16), torch.tensor(salt)) for salt in (1, 2))
    for lots in (one, one >> 16, other):
        counts = torch.bincount((lots & 0xFFFF) >> 12, minlength=16)  # 4096 of each expected, deviation 62
        assert (counts - 4096).abs().max() < 300
    assert (one == other).sum() < 10
    agree = ((one & 0x8000) == (other & 0x8000)).float().mean().item()
    assert agree == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("levels", [127, 255])
def test_codes_keep_the_mean(levels):
    """A share of the scale is kept in the mean, to the ends of the range; the scale itself exactly."""
    lot = (torch.arange(2**14) + 0.5) / 2**14  # every lot once
    for share in (1.0, 0.7, 0.1, 3e-3, 1e-6):
        levels_drawn = optimizer._level(optimizer._code(torch.full((2**14,), share), levels, lot), levels)
        assert levels_drawn.double().mean().item() == pytest.approx(share, rel=2e-3)
    assert (optimizer._code(torch.ones(2**14), levels, lot) == levels).all()
    assert (optimizer._code(torch.zeros(2**14), levels, lot) == 0).all()


def test_8_bit_state_is_a_quarter_and_trains_nearly_as_fp32_does():
    """Curvatures of a block span eight decades here: bitsandbytes' 8-bit AdamW ends 70 % away from fp32's weights."""
    found, stepping = run(lambda groups: lean(groups, True), 200)
    truth, _ = run(lean, 200)
    assert (found[0] - truth[0]).norm() < 0.08 * truth[0].norm()
    for p, q in zip(found[1:], truth[1:], strict=True):  # small: state in fp32
        assert torch.equal(p, q)
    held = sum(t.numel() * t.element_size() for t in stepping.state[found[0]].values())
    assert held == 2 * 33 * 256 + 2 * 33 * 4 + 4  # a byte each, a scale a row, the step


def test_the_second_moment_is_never_rounded_to_nothing():
    """A row in which one number's gradient is 10^11 times the others', too far apart for a byte; and one without any."""
    weights = nn.Parameter(torch.zeros(32, 256))
    stepping = LeanAdamW([weights], **COMMON, eight_bits=True)
    weights.grad = torch.full((32, 256), 1e-11)
    weights.grad[:, 0] = 1.0
    weights.grad[31] = 0.0
    stepping.step()
    codes = stepping.state[weights]["exp_avg_sq"]
    assert codes[:31].min() == 1 and codes[:31, 0].min() == 255
    assert not codes[31].any() and weights[31].abs().max() == 0


@pytest.mark.parametrize("eight_bits", [False, True])
def test_a_run_that_stopped_goes_on_bit_for_bit(tmp_path, eight_bits):
    straight, _ = run(lambda groups: lean(groups, eight_bits), 12, BF16)
    own, stepping = run(lambda groups: lean(groups, eight_bits), 7, BF16)
    torch.save([stepping.state_dict(), *own], tmp_path / "state.pt")
    torch.manual_seed(99)  # lots do not come from the global random state
    before = torch.get_rng_state()
    state, *again = torch.load(tmp_path / "state.pt", weights_only=True)
    other = lean([{"params": again[:2], "weight_decay": 0.1}, {"params": again[2:]}], eight_bits)
    other.load_state_dict(state)
    for step in range(7, 12):
        give_gradients(again, step)
        other.step()
    assert torch.equal(before, torch.get_rng_state())
    for p, q in zip(again, straight, strict=True):
        assert torch.equal(p, q)
    kinds = {t.dtype for held in other.state.values() for t in held.values() if t.ndim}
    assert kinds == ({torch.int8, torch.uint8, torch.float32} if eight_bits else {torch.float32})


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(parameters(BF16))


def test_sharded_weights_step_as_whole_ones_do_and_share_their_checkpoints(tmp_path):
    """Bit for bit: one process, then two with 17 and 16 rows, then one again; four steps each."""
    straight, _ = run(lambda groups: lean(groups, True), 12, BF16)
    own, stepping = run(lambda groups: lean(groups, True), 4, BF16)
    state = {f"weights.{i}": p.detach() for i, p in enumerate(own)}
    checkpoint = {"state_dict": state, "optimizer_states": [stepping.state_dict()]}
    FolderCheckpointIO().save_checkpoint(checkpoint, tmp_path / "step-00000004")
    spawn(four_sharded_steps, 2, tmp_path / "ranks", str(tmp_path))
    stored = FolderCheckpointIO().load_checkpoint(tmp_path / "step-00000008")
    own = [nn.Parameter(stored["state_dict"][f"weights.{i}"]) for i in range(3)]
    other = lean([{"params": own[:2], "weight_decay": 0.1}, {"params": own[2:]}], True)
    other.load_state_dict(stored["optimizer_states"][0])
    for step in range(8, 12):
        give_gradients(own, step)
        other.step()
    assert all(torch.equal(p, q) for p, q in zip(own, straight, strict=True))


def four_sharded_steps(folder):
    with distributed.process_group("cpu"):
        torch.manual_seed(distributed.rank())  # as each process of a run has its own random state
        model = fully_shard(Weights(), mesh=init_device_mesh("cpu", (2,)))
        own = list(model.weights)
        stepping = lean([{"params": own[:2], "weight_decay": 0.1}, {"params": own[2:]}], True)
        stored = FolderCheckpointIO().open(f"{folder}/step-00000004")
        for index, parameter in enumerate(own):
            stored["state_dict"][f"weights.{index}"].into(parameter)
        state = stored["optimizer_states"][0]
        placed = {i: change(values, _of(own[i])) for i, values in state["state"].items()}
        stepping.load_state_dict({**state, "state": placed})
        for step in range(4, 8):
            give_sharded_gradients(own, step)
            stepping.step()
        checkpoint = {"state_dict": model.state_dict(), "optimizer_states": [stepping.state_dict()]}
        FolderCheckpointIO().save_checkpoint(checkpoint, f"{folder}/step-00000008")


def give_sharded_gradients(own, step):
    rows = slice(0, 17) if distributed.rank() == 0 else slice(17, 33)
    local = [nn.Parameter(p.to_local().detach()) for p in own]
    give_gradients(local, step, rows)
    for p, q in zip(own, local, strict=True):
        p.grad = torch.zeros_like(p)
        p.grad.to_local().copy_(q.grad)


def test_a_bf16_run_learns_what_an_fp32_run_does():
    """Forty steps of SFT on the same conversations: the held-in loss falls as far, to within 2 %."""
    losses = {}
    batch = pack_conversations(conversations())
    for dtype, name in ((torch.float32, "adamw"), (BF16, "adamw"), (BF16, "adamw_8bit")):
        policy = tiny.model(0, attn_implementation=SEGMENTS).to(dtype)
        task = SFT(policy, replace(ADAMW, name=name, warmup_ratio=0.0), 40, 10.0)
        stepping = task.configure_optimizers()["optimizer"]
        for _ in range(40):
            loss, _ = task.loss(batch)
            (loss / task.units(batch)).backward()
            stepping.step()
            stepping.zero_grad()
        losses[dtype, name] = (loss / task.units(batch)).item()
    truth = losses[torch.float32, "adamw"]
    assert truth < 4.5  # from ln 258 = 5.55
    assert losses[BF16, "adamw"] == pytest.approx(truth, rel=0.02)
    assert losses[BF16, "adamw_8bit"] == pytest.approx(truth, rel=0.02)


def test_copies_on_several_processes_stay_equal():
    """What a process draws elsewhere changes nothing: replicas must round alike."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(run(lambda groups: lean(groups, True), 5, BF16)[0])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


def test_pieces_of_a_large_parameter_draw_their_own_lots(monkeypatch):
    whole = copy.deepcopy(run(lambda groups: lean(groups, True), 3, BF16)[0])
    monkeypatch.setattr(optimizer, "_PIECE", 1024)
    assert torch.equal(run(lambda groups: lean(groups, True), 3, BF16)[0][0], whole[0])
