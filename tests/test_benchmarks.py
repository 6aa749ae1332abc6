"""The benchmarks measure the same thing on both sides, and what they say of growth holds; short forms of each."""

import gc
import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks import cpu, feedback, floor, gpu, growth, ms_swift, shapes, table, turns
from benchmarks.child import in_child
from benchmarks.loops import Job, Record
from zephyr.data.batch import Conversation, Pair, pack_pairs
from zephyr.data.modules import Steps
from zephyr.dpo import DPO

LITTLE = cpu.Case(shapes.TINY, 3, shapes.uniform((20, 60), (10, 40)))


def first_steps(case: cpu.Case, names: tuple[str, ...], folder) -> tuple[dict[str, Record], list]:
    """Two steps of each side's own loop; the second follows from the first one's update."""
    reference, policy = shapes.save_models(case.shape, folder)
    job = Job(case.steps(1, False, seed=3), reference, policy, case.lora, case.precomputed)
    records = {name: Record() for name in names}
    for name in names:
        player = turns.Player(name, partial(cpu.CONTENDERS[name], job, records[name], folder / name))
        player.turn()
        player.turn()
        player.end()
    return records, job.steps


@pytest.mark.parametrize(
    "case",
    [
        LITTLE,
        LITTLE._replace(precomputed=True),
        LITTLE._replace(lora=True),
        LITTLE._replace(lengths=(30, 90)),
        LITTLE._replace(lengths=(30, 90), lora=True),
    ],
    ids=["full", "precomputed", "lora", "sft", "sft_lora"],
)
def test_both_sides_take_the_same_step(case, tmp_path):
    pytest.importorskip("trl", reason="TRL is a development dependency")
    records, _ = first_steps(case, ("zephyr", "trl_best", "trl"), tmp_path)
    for name in ("trl_best", "trl"):
        apart = cpu.equality(records["zephyr"], records[name])
        assert apart["loss"] < 1e-5 and apart["gradient"] < 5e-5
        assert records["zephyr"].losses == pytest.approx(records[name].losses, rel=1e-5)
    losses = records["zephyr"].losses
    assert abs(losses[0] - 0.693147) > 1e-3  # at ln 2 the reference would not count
    assert losses[0] != losses[1]


def test_ms_swift_takes_the_same_step(tmp_path):
    if (reason := ms_swift.missing("cpu")) is not None:
        pytest.skip(reason)
    reference, policy = shapes.save_models(shapes.TINY, tmp_path)
    job = Job(LITTLE.steps(2, False, seed=3), reference, policy)
    ours, theirs, halves = (Record(wants_gradient=name != "halves") for name in ("ours", "theirs", "halves"))
    cpu.CONTENDERS["zephyr"](job, ours, tmp_path / "ours", lambda: None)
    ms_swift.loop(torch.float32, 1, job, theirs, tmp_path / "theirs", lambda: None)
    apart = cpu.equality(ours, theirs)
    assert apart["loss"] < 1e-5 and apart["gradient"] < 5e-5
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    pieces = len(job.steps[0])
    ms_swift.loop(torch.float32, pieces, job, halves, tmp_path / "halves", lambda: None)
    assert sum(halves.losses[:pieces]) == pytest.approx(ours.losses[0], rel=1e-5)


def test_ms_swift_says_why_it_cannot_run(monkeypatch, tmp_path):
    found: dict[str, str] = {}
    monkeypatch.setattr(ms_swift.machine, "versions", lambda: found)
    monkeypatch.setattr(ms_swift, "find_spec", lambda name: None)
    assert ms_swift.missing("cuda") == "ms-swift is not installed"
    found |= {"ms-swift": "4.6.0", "trl": "1.16.0"}
    assert "below 1.0" in ms_swift.missing("cuda")
    skipped = gpu.run_one("dpo_lora", "ms_swift", shapes.TINY, "cpu", tmp_path, steps=3, warmup=1, seconds=60)
    assert skipped == {"skipped": ms_swift.missing("cpu")}
    found["trl"] = "0.29.1"
    assert "flash-attn" in ms_swift.missing("cuda")
    assert ms_swift.missing("cpu") is None
    skipped = gpu.run_one("dpo_lora", "trl", shapes.TINY, "cpu", tmp_path, steps=3, warmup=1, seconds=60)
    assert "ms-swift" in skipped["skipped"]  # importing it breaks TRL's own trainer


def test_a_gradient_or_a_loss_that_is_off_is_refused():
    gradient = {"a": torch.ones(4), "b": torch.ones(2)}
    record = Record([1.0], gradient=gradient)
    with pytest.raises(AssertionError, match="losses"):
        cpu.equality(record, Record([1.0 + 2e-5], gradient=gradient))
    with pytest.raises(AssertionError, match="gradients"):
        cpu.equality(record, Record([1.0], gradient={**gradient, "b": torch.tensor([1.0, 1.0002])}))
    with pytest.raises(AssertionError, match="parameters"):
        cpu.equality(record, Record([1.0], gradient={"a": torch.ones(4)}))


def test_zephyr_processes_half_the_tokens_that_a_padded_batch_holds():
    case = cpu.CASES["dpo_ultrafeedback"]
    packed = padded = real = 0
    for step in case.steps(20, False, seed=1):
        packed += len(pack_pairs(step).ids)
        padded += 2 * len(step) * max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in step)
        real += sum(map(shapes.real_tokens, step))
    assert 0.3 < packed / padded < 0.5
    assert packed < 0.9 * real < 0.9 * padded


def test_real_tokens_count_a_prompt_with_each_completion():
    assert shapes.real_tokens(Pair([5, 6, 7], [8, 2], [2])) == 9
    assert shapes.real_tokens(Conversation([5, 6], [True, True])) == 2


def test_the_loader_visits_examples_in_the_order_given():
    pairs = shapes.random_pairs(6, shapes.SHORT, 512, 0)
    examples = shapes.InMemory(shapes.in_order_of(7, pairs), None)
    steps = Steps(examples, 2, 10_000, 3, 7)
    for number in range(3):
        (batch,) = steps[number]
        own = {tuple(p.prompt + p.chosen + p.rejected) for p in pairs[2 * number : 2 * number + 2]}
        ids, found = batch.ids.tolist(), set()
        for chosen, rejected in zip(batch.segments[::2], batch.segments[1::2], strict=True):
            found.add(tuple(ids[chosen.start : rejected.end]))
        assert found == own


def test_lengths_are_those_of_the_laws():
    pairs = shapes.random_pairs(3000, shapes.ultrafeedback, 512, 0)
    mean = [sum(len(p[i]) for p in pairs) / len(pairs) for i in range(3)]
    assert mean == pytest.approx([160, 300, 280], rel=0.1)  # what is cut is missing from the law's means
    assert max(len(p.prompt) for p in pairs) == 512
    assert max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs) == 1024
    assert all(p.chosen[-1] == p.rejected[-1] == shapes.EOS for p in pairs)


def test_sorting_keeps_the_timed_examples_and_both_ends():
    job = Job(LITTLE.steps(5, False, seed=0), None, None)
    by_length = cpu.sorted_by_length(job)
    assert by_length.steps[0] == job.steps[0] and by_length.steps[-1] == job.steps[-1]
    flat = [[pair for step in steps[1:-1] for pair in step] for steps in (job.steps, by_length.steps)]
    assert flat[0] != flat[1] and sorted(flat[0]) == sorted(flat[1])

    def padded(steps):
        return sum(max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in step) for step in steps[1:])

    assert padded(by_length.steps) < padded(job.steps)
    assert replace(by_length, steps=job.steps) == job


def test_floor_counts_by_hand():
    # hidden 4, 2 layers, intermediate 6, 2 heads of 2 and 1 for keys and values, vocabulary 8
    shape = shapes.Shape(4, 2, 6, 2, 1, 8)
    batch = pack_pairs([Pair([1, 2, 3], [4, 5], [6])])  # 6 tokens; read are rows 2 and 3, as row 5 predicts nothing
    assert batch.tail.rows.tolist() == [2, 3]
    every = 2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 6  # q o, k v, gate up down of one layer
    last = 6 * (2 * 4 * 2) + 2 * (2 * 4 * 4 + 3 * 4 * 6)
    assert floor.linear_flops(shape, batch) == 2 * (6 * every + last + 3 * 4 * 8)
    # contexts: prompt and chosen 1 + 2 + 3 + 4 + 5, rejected 3 + 1; in the last layer rows 2 and 3 see 3 and 4
    assert floor.attention_flops(shape, batch) == 4 * 4 * (15 + 4 + 3 + 4)
    assert floor.step_flops(shape, batch) == 4 * (
        floor.linear_flops(shape, batch) + floor.attention_flops(shape, batch)
    )


def test_turns_alternate_and_one_runs_at_a_time():
    seen = []

    def loop(name, step_ended):
        for step in range(3):
            seen.append((name, step))
            step_ended()

    players = [turns.Player(name, partial(loop, name)) for name in "ab"]
    for _ in range(2):
        for player in players:
            assert player.turn().seconds >= 0
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    players[0].end()
    players[1].turn()
    with pytest.raises(RuntimeError, match="loop of b ended") as caught:
        players[1].turn()
    assert "ran out of steps" in str(caught.value.__cause__)


def test_a_transient_is_seen_though_it_is_gone_afterwards():
    assert turns.transient_mib(lambda: torch.ones(64 * 2**18).sum()) == pytest.approx(64, abs=8)


def test_what_fails_in_a_process_is_said():
    assert in_child(sum, [1, 2]) == 3
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        in_child(lambda: 1 / 0)


def test_summary_takes_the_median_of_rounds():
    figures = {"zephyr": {"tokens_per_cpu_second": 10.0, "mfu": 0.5}, "trl_best": {"tokens_per_cpu_second": 5.0}}
    results = {
        "dpo_body": {
            "figures": figures,
            "ratios": {"trl_best": [2.0, 4.0, 2.5], "trl": [3.0]},
            "floor": [(0.5, 0.4), (0.7, 0.6)],
        },
        "dpo_memory": {"figures": {}, "ratios": {"trl_best": [0.4], "trl": [0.4]}},
    }
    summary = cpu.summary(results)
    assert summary["ratios"] == {
        "dpo_body": 2.5,
        "floor": pytest.approx(0.6),
        "floor_fastest": pytest.approx(0.5),
        "dpo_memory": 0.4,
    }
    assert summary["ratios_default"] == {
        "dpo_body": 3.0,
        "floor": pytest.approx(0.6),
        "floor_fastest": pytest.approx(0.5),
        "dpo_memory": 0.4,
    }
    assert summary["spread"]["ratios"]["dpo_body"] == {"min": 2.0, "max": 4.0, "rounds": [2.0, 4.0, 2.5]}
    printed = table.cpu_table(json.loads(json.dumps(summary)))
    assert "| dpo_body | **2.50** | 2.00 to 4.00 | 3.00 |" in printed


def test_the_check_of_attention_sees_a_lost_prompt(monkeypatch):
    from zephyr.models import attention

    cpu_device = torch.device("cpu")
    assert max(gpu.check_attention(shapes.TINY, cpu_device, torch.float32).values()) < 1e-5

    def alone(segments, *others):  # every segment without its prefix
        return plan([s._replace(prefix_start=s.start, prefix_end=s.start) for s in segments], *others)

    plan = attention.Plan
    monkeypatch.setattr(attention, "Plan", alone)
    with pytest.raises(AssertionError, match="attention is off"):
        gpu.check_attention(shapes.TINY, cpu_device, torch.float32)


def test_the_first_way_that_fits_is_taken_and_a_failure_is_told():
    configuration = gpu.CONFIGURATIONS["dpo_cached"]

    def run(way):
        if way.checkpointing == "none":
            raise torch.OutOfMemoryError
        return {"tokens_per_second": 1.0}

    found = gpu.attempt(configuration, run)
    assert found["checkpointing"] == "selective" and found["tokens_per_second"] == 1.0
    assert [way["checkpointing"] for way in found["did_not_fit"]] == ["none"]

    def broken(way):
        raise ImportError("no such kernel")

    assert gpu.attempt(configuration, broken)["skipped"] == "ImportError: no such kernel"


@pytest.mark.parametrize("name", ["dpo_live", "dpo_cached", "sft_lora"])
def test_a_gpu_row_runs_on_a_cpu(name, tmp_path):
    shapes.TINY.config().save_pretrained(tmp_path)
    found = gpu.run_one(name, "zephyr", shapes.TINY, "cpu", tmp_path, steps=3, warmup=1, seconds=60)
    assert found.get("skipped") is None and found["steps"] == 2
    assert found["tokens_per_second"] > 0 and found["flops_per_second"] > 0
    if name != "sft_lora":
        assert found["losses"][0] == pytest.approx(0.693147, abs=1e-5)  # policy and reference begin as one
        assert found["tokens_per_second"] > found["packed_tokens_per_second"]


def test_no_weights_of_a_configuration_are_left_for_the_next_one(tmp_path, monkeypatch):
    def models() -> set[int]:
        return {id(x) for x in gc.get_objects() if isinstance(x, PreTrainedModel)}

    shapes.TINY.config().save_pretrained(tmp_path)
    gc.collect()
    before = models()
    given = shapes.TINY, "cpu", tmp_path, 3, 1, 60
    assert "skipped" not in gpu.run_one("dpo_live", "zephyr", *given)
    assert models() <= before

    def too_large(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(DPO, "training_step", too_large)
    assert gpu.run_one("dpo_live", "zephyr", *given)["skipped"] == "does not fit"
    assert models() <= before


def test_a_token_costs_the_same_in_small_and_large_steps():
    costs = in_child(growth.time_a_token, [11, 13], 3)
    assert max(costs.values()) / min(costs.values()) < 1.6  # the machine's mood; the long form allows 1.25


def test_activations_do_not_grow_with_the_vocabulary():
    mib = {vocabulary: in_child(growth.activations, vocabulary, 1) for vocabulary in (32000, 128000)}
    assert abs(mib[128000] / mib[32000] - 1) < growth.MEMORY
    assert mib[32000] > 200  # the head's buffer is among them


def test_memory_does_not_grow_over_steps_of_varying_lengths():
    found = in_child(growth.many_steps, 120, 40, False)
    assert found["lengths"] > 100
    assert found["growth_mib"] < growth.RESIDENT


def test_feedback_survives_faults_and_kills(tmp_path, monkeypatch):
    """The short form of the proof."""
    output = tmp_path / "results.json"
    line = ["feedback", "--only", "faults", "--only", "kills", "--prompts", "20", "--kills", "2"]
    monkeypatch.setattr(sys, "argv", [*line, "--folder", str(tmp_path), "--output", str(output)])
    with pytest.raises(SystemExit) as stop:
        feedback.main()
    assert stop.value.code == 0
    found = json.loads(output.read_text())
    assert found["faults"]["identical"] and found["kills"]["identical"]
    assert found["faults"]["failures"] == 0 and found["faults"]["requests_sent"] > found["faults"]["requests_answered"]
    assert found["kills"]["recorded_and_asked_again"] == 0
    assert found["kills"]["requests_sent"] < 1.2 * 20 * feedback.REQUESTS


def test_the_ledger_and_the_rate_of_requests_can_be_measured(tmp_path):
    found = feedback.ledger(tmp_path, 1_000)
    assert found["sizes"][0]["rows"] == 1_000 and 0 < found["sizes"][0]["put_us"] < 5_000
    speed = feedback.throughput(tmp_path, 200, rounds=1)
    assert 0 < speed["share_of_ideal_whole_command"] <= 1.0 and 0 < speed["share_of_ideal"] <= 1.0
