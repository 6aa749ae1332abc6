"""Every objective of the configuration trains a policy; a reference that follows the policy does so."""

import copy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests import tiny
from tests.test_conf import CONF, load
from tests.test_parity import ADAMW, dpo_task, perturbed, random_pairs
from zephyr.data.batch import pack_pairs
from zephyr.dpo import DPO
from zephyr.models.attention import SEGMENTS
from zephyr.models.policy import Placement, load_policy
from zephyr.models.reference import AdapterOff, Copy, Precomputed, precompute, precomputed_file
from zephyr.objectives import OBJECTIVES, REFERENCE_FREE
from zephyr.settings import Reference, parse

NAMES = sorted(path.stem for path in (CONF / "objective").glob("*.yaml"))
CPU = Placement(torch.device("cpu"), "32-true")


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_of_the_configuration_trains(name):
    """A few steps on the same pairs lower its loss."""
    objective = parse(load("stage=dpo", f"objective={name}", "objective.beta=0.1")).objective
    policy = tiny.model(0, attn_implementation=SEGMENTS)
    reference = None if name in REFERENCE_FREE else Copy(copy.deepcopy(policy))
    task = DPO(policy, ADAMW, 10, 10.0, objective=objective, reference=reference)
    batches = [pack_pairs(random_pairs(4)), pack_pairs(random_pairs(2, seed=9))]
    optimizer, losses = torch.optim.AdamW(policy.parameters(), lr=3e-3), []
    for _ in range(6):
        optimizer.zero_grad()
        step = torch.zeros((), dtype=torch.float64)
        for loss, _sums in task.losses(batches):
            loss.backward()
            step += loss.detach()
        optimizer.step()
        losses.append(step.item())
    assert losses[-1] < losses[0] - 1e-3 * abs(losses[0]), losses


def test_the_configuration_has_every_objective():
    assert set(NAMES) == set(OBJECTIVES)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.model(0).save_pretrained(folder)
    return str(folder)


def test_a_copy_moves_by_its_share_towards_the_policy():
    reference, policy = tiny.model(0), perturbed(tiny.model(0))
    before = [p.clone() for p in reference.parameters()]
    Copy(reference).follow(policy, 0.25)
    for now, was, goal in zip(reference.parameters(), before, policy.parameters(), strict=True):
        assert_close(now, 0.75 * was + 0.25 * goal)


def test_an_adapter_follows_through_a_second_one(base):
    """After a replacement (share 1) policy and reference agree again, though both have moved."""
    settings = tiny.model_settings(tiny.lora())
    policy = load_policy(base, None, settings, CPU, follower=True)
    follows = {"reference": AdapterOff(follows=True), "sync": Reference("adapter", 1, 1.0)}
    task = DPO(policy, ADAMW, 10, 10.0, objective=tiny.objective(), **follows)
    batch = pack_pairs(random_pairs())
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    assert abs(task.loss(batch)[1]["rewards/margins"].item()) > 1e-3
    task.reference.follow(policy, 1.0)
    assert task.loss(batch)[1]["rewards/margins"].item() == 0
    changing = task.changing()
    assert {name for name in changing if ".reference." in name} and {name for name in changing if ".default." in name}


def test_precomputed_log_probabilities_are_kept_and_are_the_copys(tmp_path):
    reference = tiny.model(0)
    policy, pairs = perturbed(reference), random_pairs(6)
    live = dpo_task(copy.deepcopy(reference), policy)
    at_start = dpo_task(reference, reference)
    shares = [([4, 1], pack_pairs([pairs[4], pairs[1]])), ([0, 2, 3, 5], pack_pairs([pairs[i] for i in (0, 2, 3, 5)]))]
    file = precomputed_file(tmp_path, data="d", weights="w")
    table = precompute(reference, shares, 6, at_start.sequence_logps, file, known=False, autocast=None)
    again = precompute(None, [], 6, at_start.sequence_logps, file, known=True, autocast=None)
    assert (table == again).all()
    batch = pack_pairs(pairs)._replace(reference=torch.from_numpy(table.T.reshape(-1)))
    cached = DPO(policy, ADAMW, 10, 10.0, objective=tiny.objective(), reference=Precomputed())
    (loss, sums), (truth, true_sums) = cached.loss(batch), live.loss(batch)
    assert_close(loss, truth, rtol=1e-7, atol=0)
    for name, value in sums.items():
        assert_close(value, true_sums[name], rtol=1e-6, atol=1e-6)


def test_the_name_of_precomputed_log_probabilities_depends_on_all_that_decides_them(tmp_path: Path):
    common = {"data": "d", "weights": "w", "precision": "32-true"}
    files = {precomputed_file(tmp_path, **{**common, key: "other"}) for key in common}
    assert len(files | {precomputed_file(tmp_path, **common)}) == 4
