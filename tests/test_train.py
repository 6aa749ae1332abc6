"""A run is a command, so it is tested as one: both stages, what they leave, stopping and going on."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.commands import ROOT, metrics, start, steps_done, train, weights, world


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """SFT, then DPO from its model; both finished."""
    folder = world(tmp_path_factory.mktemp("runs"))
    train(folder, "sft", folder / "sft", "trainer.max_steps=60", "logger=wandb", "checkpoint.every_n_steps=50")
    train(folder, "dpo", folder / "dpo", f"model.path={folder / 'sft/model'}", "trainer.max_steps=40")
    return folder


def column(output, name):
    return [line[name] for line in metrics(output) if name in line]


def test_a_finished_stage_leaves_what_the_contract_names(runs):
    for stage in ("sft", "dpo"):
        names = {path.name for path in (runs / stage).iterdir()}
        assert {"model", "metrics.jsonl", "config.yaml", "summary.json", "plots", "checkpoints"} <= names
        assert (runs / stage / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert yaml.safe_load((runs / stage / "config.yaml").read_text())["stage"] == stage
    assert {path.stem for path in (runs / "dpo/plots").iterdir()} >= {"loss", "rewards", "accuracies", "margins"}
    assert (runs / "sft/wandb").is_dir() and not (runs / "dpo/wandb").exists()


def test_metrics_have_the_fields_names(runs):
    names = {name for line in metrics(runs / "dpo") for name in line}
    watched = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    watched += ["logps/chosen", "logps/rejected"]
    expected = {f"{split}/{name}" for split in ("train", "eval") for name in watched}
    assert names >= expected | {"step", "epoch", "train/grad_norm", "train/learning_rate", "num_tokens"}
    raw = [json.loads(line) for line in (runs / "dpo/metrics.jsonl").read_text().splitlines()]
    assert {"tokens_per_second", "peak_memory_gib"} <= {name for line in raw for name in line}
    trained = [line["step"] for line in metrics(runs / "dpo") if "train/loss" in line]
    assert trained == list(range(1, 41))
    assert [line["step"] for line in metrics(runs / "dpo") if "eval/loss" in line] == [*range(0, 41, 5)]


def test_both_stages_learn(runs):
    sft = column(runs / "sft", "train/loss")
    assert sft[-1] < 0.6 * sft[0]
    loss, accuracy = column(runs / "dpo", "train/loss"), column(runs / "dpo", "eval/rewards/accuracies")
    assert loss[0] == pytest.approx(0.693147, abs=1e-5)
    assert column(runs / "dpo", "eval/loss")[0] == pytest.approx(0.693147, abs=1e-5)
    assert column(runs / "dpo", "eval/rewards/margins")[0] == 0
    assert column(runs / "dpo", "train/grad_norm")[0] > 0
    assert loss[-1] < 0.5 and accuracy[0] == 0.5 and accuracy[-1] > 0.9
    summary = json.loads((runs / "dpo/summary.json").read_text())
    assert summary["eval"]["eval/rewards/accuracies"] == accuracy[-1]
    assert summary["eval_at_start"]["eval/rewards/accuracies"] == 0.5
    assert summary["data"]["train"]["kept"] == 64


def test_the_model_loads_with_plain_transformers(runs):
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer as T\n"
        "assert 'zephyr' not in sys.modules\n"
        "m, t = AutoModelForCausalLM.from_pretrained(sys.argv[1]), T.from_pretrained(sys.argv[1])\n"
        "x = t.apply_chat_template([{'role': 'user', 'content': '3?'}], add_generation_prompt=True, return_tensors='pt', "
        "return_dict=True)\n"
        "print(t.decode(m.generate(**x, max_new_tokens=6, do_sample=False)[0, x['input_ids'].shape[1]:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs / "sft/model")], capture_output=True, text=True, check=True
    )
    assert "yes" in done.stdout


def test_lm_eval_takes_the_model(runs, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval comes with the tests' extra")
    (tmp_path / "docs.json").write_text(json.dumps([{"q": "<|user|>\n3?</s>\n<|assistant|>\n", "a": 0}] * 3))
    (tmp_path / "task.yaml").write_text(
        "task: tiny\ndataset_path: json\ndataset_kwargs: {data_files: {test: " + str(tmp_path / "docs.json") + "}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: ['yes', 'qqq']\n"
        "doc_to_target: a\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\nmetadata: {version: 0}\n"
    )
    code = (
        "import sys; from lm_eval import simple_evaluate; from lm_eval.tasks import TaskManager\n"
        "tasks = TaskManager(include_path=sys.argv[2], include_defaults=False)\n"
        "r = simple_evaluate(model='hf', model_args={'pretrained': sys.argv[1], 'device': 'cpu'}, tasks=['tiny'], "
        "task_manager=tasks)\n"
        "print('accuracy', r['results']['tiny']['acc,none'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs / "sft/model"), str(tmp_path)], capture_output=True, text=True
    )
    assert "accuracy 1.0" in done.stdout, done.stderr


def test_a_finished_run_is_not_trained_again_with_resume(runs):
    before = weights(runs / "dpo")
    done = train(runs, "dpo", runs / "dpo", f"model.path={runs / 'sft/model'}", "resume=auto")
    assert "is finished already" in done.stderr and weights(runs / "dpo") == before


def test_the_same_command_gives_the_same_bits_and_keeps_the_earlier_run(runs):
    before, lines = weights(runs / "dpo"), metrics(runs / "dpo")
    train(runs, "dpo", runs / "dpo", f"model.path={runs / 'sft/model'}", "trainer.max_steps=40")
    assert weights(runs / "dpo") == before == weights(runs / "dpo.1")
    assert metrics(runs / "dpo") == lines


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_saves_and_goes_on_as_if_nothing_had_been(tmp_path, stop, status):
    folder = world(tmp_path)
    train(folder, "dpo", folder / "whole")
    process = start(folder, "dpo", folder / "stopped", "trainer.max_steps=12", "checkpoint.every_n_steps=100")
    while steps_done(folder / "stopped") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(stop)
    assert process.wait(60) == status
    [saved] = (folder / "stopped/checkpoints").iterdir()
    assert 3 <= int(saved.name.removeprefix("step-")) < 12
    train(folder, "dpo", folder / "stopped", "resume=auto")
    assert weights(folder / "stopped") == weights(folder / "whole")
    assert metrics(folder / "stopped") == metrics(folder / "whole")


def test_bf16_trains(tmp_path):
    folder = world(tmp_path)
    train(folder, "dpo", folder / "bf16", "trainer.precision=bf16-mixed", "model.activation_checkpointing=full")
    loss = column(folder / "bf16", "train/loss")
    assert loss[0] == pytest.approx(0.693147, abs=1e-3) and loss[-1] < loss[0]


def test_models_and_data_come_from_the_hubs_cache(tmp_path):
    """A snapshot as huggingface_hub keeps it stands in for the download; nothing else is different."""
    folder, commit = world(tmp_path), "0123456789abcdef0123456789abcdef01234567"
    hub = tmp_path / "hub"
    shutil.copytree(folder / "base", hub / "models--org--base" / "snapshots" / commit)
    data = hub / "datasets--org--pairs" / "snapshots" / commit / "data"
    data.mkdir(parents=True)
    for split in ("train_prefs", "test_prefs"):
        rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
        pq.write_table(pa.Table.from_pylist(rows), data / f"{split}-00000-of-00001-x.parquet")
    source = [
        f"data.{name}=org/pairs@{commit}:{split}"
        for name, split in (("train", "train_prefs"), ("validation", "test_prefs"))
    ]
    train(
        folder, "dpo", folder / "dpo", "trainer.max_steps=2", "model.path=org/base", f"model.revision={commit}", *source,
        environment={"HF_HUB_CACHE": str(hub)},
    )  # fmt: skip
    card = (folder / "dpo/model/README.md").read_text()
    assert "base_model: org/base" in card and "org/pairs" in card and commit in card


def test_the_root_is_left_clean(runs):
    assert not {"wandb", "multirun", "lightning_logs", ".hydra"} & {path.name for path in ROOT.iterdir()}
