"""One process, DDP and FSDP2 train the same model; every reference starts at ln 2; sharded runs go on anywhere."""

import json
import math
import shutil
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests import tiny
from tests.commands import metrics, train, world
from tests.ranks import spawn
from tests.test_conf import load
from zephyr.errors import UserError
from zephyr.settings import Settings, parse

TWENTY = ("trainer.max_steps=20", "trainer.eval_every_n_steps=null", "samples.count=1", "data.batch_size=8")
WAYS = {
    "single": ("trainer.devices=1",),
    "ddp": ("trainer=ddp", "trainer.devices=2"),
    "fsdp": ("trainer=fsdp", "trainer.devices=2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world(tmp_path_factory.mktemp("strategies"))


@pytest.fixture(scope="module")
def runs(folder):
    """Twenty steps of each stage in each way; sharded DPO keeps the checkpoint of step 10."""
    for stage, (name, way) in product(("sft", "dpo"), WAYS.items()):
        kept = ("checkpoint.every_n_steps=10", "checkpoint.keep=9") if stage == "dpo" else ()
        train(folder, stage, folder / f"{stage}-{name}", *TWENTY, *way, *kept)
    return folder


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


@pytest.mark.parametrize(("stage", "way"), [*product(("sft", "dpo"), ("ddp", "fsdp"))])
def test_several_processes_train_as_one_does(runs, stage, way):
    one, several = (metrics(runs / f"{stage}-{name}") for name in ("single", way))
    assert len(one) == len(several) and sum("train/loss" in row for row in several) == 20
    for row, truth in zip(several, one, strict=True):
        assert row == pytest.approx(truth, rel=1e-5, abs=1e-6), row["step"]
    model, true_model = weights(runs / f"{stage}-{way}"), weights(runs / f"{stage}-single")
    assert model.keys() == true_model.keys()
    for name, value in model.items():
        assert_close(value, true_model[name], rtol=1e-4, atol=3e-6, msg=name)


def test_the_gradient_was_clipped_in_that_comparison(runs):
    assert max(row["train/grad_norm"] for row in metrics(runs / "sft-fsdp") if "train/loss" in row) > 1.0


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_sharded_checkpoint_goes_on_with_any_number_of_processes(runs, processes):
    """Two processes saved it; the numbers that follow are those of the uninterrupted run."""
    output = runs / f"resumed-{processes}"
    shutil.copytree(runs / "dpo-fsdp", output, ignore=shutil.ignore_patterns("step-00000020", "model", "summary.json"))
    way = WAYS["fsdp"] if processes > 1 else ("trainer=auto",)
    train(runs, "dpo", output, *TWENTY, *way, f"trainer.devices={processes}", "resume=auto",
          "checkpoint.every_n_steps=10", "checkpoint.keep=9")  # fmt: skip
    for row, truth in zip(metrics(output), metrics(runs / "dpo-fsdp"), strict=True):
        assert row == pytest.approx(truth, rel=1e-5, abs=1e-6), row["step"]
    for name, value in weights(output).items():
        truth = weights(runs / "dpo-fsdp")[name]
        if processes == 2:
            assert torch.equal(value, truth), name
        assert_close(value, truth, rtol=1e-4, atol=3e-6, msg=name)


ADAPTERS = {
    "full": (),
    "lora": ("trainer=lora", "model.lora.rank=4"),
    "qlora": ("trainer=qlora", "model.lora.rank=4"),
}
GRID = list(product(ADAPTERS, ("copy", "adapter", "precomputed"), ("single", "fsdp")))
REFUSED = {("full", "adapter")}  # there is no adapter to switch off


def first_losses(configs: dict[str, dict], folder: str) -> dict[str, float]:
    """The mean loss of this process's pairs of step 0, of tasks built as a run builds them."""
    from zephyr import distributed

    found = {}
    several = distributed.world_size() > 1
    with distributed.process_group("cpu") if several else nullcontext():  # one for all
        if several:
            distributed.process_group = lambda _: nullcontext()
        for name, config in configs.items():
            found[name] = first_loss(name, parse(config))
    return found


def first_loss(name: str, settings: Settings) -> float:
    from zephyr import distributed
    from zephyr.data.modules import PreferenceData
    from zephyr.models.policy import check_policy
    from zephyr.running.assemble import Start, build_task
    from zephyr.running.placement import choose, placed

    choice = choose(settings.trainer, lambda: 0.0)
    with placed(choice, settings) as placement:
        data = PreferenceData(settings.data, tiny.tokenizer(), 1, 3, 0, distributed.rank(), distributed.world_size())
        with distributed.local_first():
            data.load()
        start = Start("base", settings.model.path, None, check_policy(settings.model.path, None), name)
        task = build_task(settings, start, data, placement, choice)
        loss, pairs = torch.zeros((), dtype=torch.float64), 0
        for batch in next(iter(data.train_dataloader())):
            micro, sums = task.loss(batch)
            assert float(sums["rewards/margins"]) == pytest.approx(0, abs=1e-5), name
            micro.backward()
            loss, pairs = loss + micro.detach(), pairs + batch.examples
        moving = [p.grad for p in task.trainable() if p.grad is not None]
        assert float(torch.nn.utils.get_total_norm(moving)) > 0, name
        return loss.item() / pairs


def grid(folder: Path, way: str) -> dict[str, dict]:
    common = [
        "stage=dpo", f"model.path={folder / 'base'}", f"data.train={folder / 'pairs.jsonl'}", "data.validation=null",
        f"data.cache={folder / 'cache'}", "data.batch_size=8", "data.micro_batch_tokens=256", "logger=none",
    ]  # fmt: skip
    return {
        f"{kind} {mode}": load(*ADAPTERS[kind], f"reference={mode}", *common, *WAYS_OF_ONE[way])
        for kind, mode, one_way in GRID
        if one_way == way and (kind, mode) not in REFUSED
    }


WAYS_OF_ONE = {"single": ("trainer.devices=1",), "fsdp": ("trainer.strategy=fsdp", "trainer.devices=2")}


@pytest.mark.parametrize("way", WAYS_OF_ONE)
def test_step_zero_is_ln_2_in_every_combination(folder, tmp_path, way):
    pytest.importorskip("bitsandbytes")
    configs = grid(folder, way)
    assert len(configs) == 8
    if way == "single":
        results = [first_losses(configs, str(folder))]
    else:
        results = spawn(first_losses, 2, tmp_path, configs, str(folder))
    for losses in results:
        assert losses == pytest.approx(dict.fromkeys(configs, math.log(2)), abs=1e-6)


@pytest.mark.parametrize(("kind", "mode"), sorted(REFUSED))
def test_a_reference_that_cannot_be_is_refused_with_the_reason(kind, mode):
    from zephyr.running.assemble import check_objective

    settings = parse(load(*ADAPTERS[kind], "stage=dpo", f"reference={mode}"))
    with pytest.raises(UserError, match="switches the policy's adapter off, and all weights are trained here"):
        check_objective(settings)


def test_ranks_write_their_own_logs_with_the_same_configuration(runs):
    log = (runs / "dpo-fsdp" / "ranks" / "rank-1.log").read_text()
    assert "Process 1 of 2, configuration " in log and "beta=0.1" in log


def test_summary_tells_nothing_else_than_one_process_does(runs):
    one, several = (json.loads((runs / f"dpo-{n}" / "summary.json").read_text()) for n in ("single", "fsdp"))
    assert one["steps"] == several["steps"] == 20 and one["data"] == several["data"]
