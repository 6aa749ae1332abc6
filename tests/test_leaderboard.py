"""Leaderboard scores against what the `lm_eval` command gives for the same checkpoint: every digit."""

import json
import random
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import conf
from tests import tiny
from zephyr.errors import UserError
from zephyr.evaluation import leaderboard
from zephyr.evaluation.settings import parse

pytest.importorskip("lm_eval")
WORDS = ["red", "blue", "green", "one", "two", "three", "sun", "moon", "sea"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, an adapter of it, the same model stored in four bits, and three tasks over local files."""
    folder = tmp_path_factory.mktemp("leaderboard")
    tokenizer = tiny.tokenizer()
    full = tiny.model()
    full.save_pretrained(folder / "full")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    four = AutoModelForCausalLM.from_pretrained(folder / "full", dtype="auto", quantization_config=bits)
    four.save_pretrained(folder / "four")
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(full, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "full")
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(folder / "adapter")
    for name in ("full", "four", "adapter"):
        tokenizer.save_pretrained(folder / name)

    tasks = folder / "tasks"
    tasks.mkdir()
    for task, documents in (("toy_long", 16), ("toy_short", 4)):
        chance = random.Random(documents)
        rows = [
            {"text": " ".join(chance.choices(WORDS, k=n % 5 + 1)), "choices": chance.sample(WORDS, 4), "answer": n % 4}
            for n in range(documents)
        ]
        (tasks / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "task": task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tasks / f"{task}.jsonl")}},
            "test_split": "test",
            "fewshot_split": "test",
            "num_fewshot": 2,
            "doc_to_text": "Say {{text}}\nAnswer:",
        }
        metrics = [{"metric": name} for name in ("acc", "acc_norm", "brier_score")]
        choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
        (tasks / f"{task}.yaml").write_text(yaml.safe_dump({**settings, **choice, "metric_list": metrics}))
        if task == "toy_long":
            writing = {
                "task": "toy_text",
                "output_type": "generate_until",
                "doc_to_target": "{{choices[answer]}}",
                "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
                "metric_list": [{"metric": "chrf"}, {"metric": "exact_match"}],
            }
            (tasks / "toy_text.yaml").write_text(yaml.safe_dump({**settings, **writing}))
    group = {"group": "toy", "task": ["toy_long", "toy_short"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tasks / "toy.yaml").write_text(yaml.safe_dump(group))
    nowhere = {"task": "nowhere", "dataset_path": "somebody/something", "test_split": "test", "doc_to_text": "text"}
    (tasks / "nowhere.yaml").write_text(yaml.safe_dump(nowhere))
    return folder


@pytest.fixture(autouse=True)
def _own_tasks_alone(monkeypatch: pytest.MonkeyPatch, place: Path):
    """lm-eval reads thousands of task files for seven seconds at every start, and lists pip's packages after each run."""
    import datasets
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda *_: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    monkeypatch.chdir(place)


def ours(place: Path, model: str, output: Path, *changes: str, tasks: str = "toy_text,toy_long,toy") -> dict:
    arguments = [
        f"model={place / model}",
        f"output={output}",
        "benchmarks=[leaderboard]",
        f"leaderboard.tasks=[{tasks}]",
        f"leaderboard.include_path={place / 'tasks'}",
        "leaderboard.batch_size=4",
        *changes,
    ]
    return leaderboard.run(parse(conf.compose("evaluate", arguments)), output / "leaderboard")


def plain(monkeypatch: pytest.MonkeyPatch, output: Path, command: str) -> dict:
    """What the `lm_eval` command writes."""
    from lm_eval.__main__ import cli_evaluate

    monkeypatch.setattr("sys.argv", [*shlex.split(command), "--output_path", str(output)])
    cli_evaluate()
    (file,) = output.rglob("results_*.json")
    return json.loads(file.read_text())["results"]


def numbers(results: dict) -> dict:
    return {key: value for key, value in results.items() if "," in key}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("full", "pretrained=full"),
        ("full", "pretrained=full --apply_chat_template --limit 7"),
        ("adapter", "pretrained=full,peft=adapter,tokenizer=adapter"),
        ("four", "pretrained=four"),
        ("full leaderboard.quantization=nf4", "pretrained=four"),
    ],
)
def test_scores_equal_those_of_the_plain_command(monkeypatch, place, tmp_path, model, words):
    model, *changes = model.split()
    if "chat_template" in words:
        changes = ["leaderboard.chat_template=true", "limit=7"]
    found = ours(place, model, tmp_path / "ours", *changes)["scores"]
    command = f"lm_eval run --model hf --model_args {words} --include_path tasks --batch_size 4 --tasks"
    for task in ("toy_text", "toy_long", "toy"):
        expected = plain(monkeypatch, tmp_path / task, f"{command} {task}")
        assert found[task]["metrics"] == numbers(expected[task])
        assert len(found[task]["metrics"]) >= 2
    assert 0 < found["toy_long"]["metrics"]["brier_score,none"] < 2  # a number that any change of a logit moves
    if "chat_template" not in words and not changes:
        told = plain(monkeypatch, tmp_path / "told", found["toy_long"]["command"])
        assert found["toy_long"]["metrics"] == numbers(told["toy_long"])


def test_the_models_differ(place, tmp_path):
    """So that a score that belongs to another of them would be seen."""
    scores = [
        ours(place, model, tmp_path / model, tasks="toy_long")["scores"]["toy_long"]["metrics"]["brier_score,none"]
        for model in ("full", "adapter", "four")
    ]
    assert len(set(scores)) == 3


def test_results_are_per_cent_beside_lm_evals_own(place, tmp_path):
    found = ours(place, "full", tmp_path)
    long, both = found["scores"]["toy_long"], found["scores"]["toy"]
    assert (long["metric"], long["shots"], long["n"]) == ("acc_norm,none", 2, 16)
    assert long["score"] == 100 * long["metrics"]["acc_norm,none"]
    assert long["stderr"] == 100 * long["metrics"]["acc_norm_stderr,none"]
    raw = json.loads((tmp_path / "leaderboard" / "raw.json").read_text())
    long, short = (raw["toy"]["results"][name]["acc,none"] for name in ("toy_long", "toy_short"))
    assert long != short
    assert both["mean_of_parts"] == 100 * (long + short) / 2  # as the leaderboard had MMLU
    assert both["score"] == pytest.approx(100 * (16 * long + 4 * short) / 20)  # as lm-eval has it
    assert (both["n"], found["n"], found["failed"]) == (20, 16 + 16 + 20, 0)
    assert found["average"] is None  # none of these is the leaderboard's
    assert leaderboard.summary(found).splitlines()[1].split()[0] == "toy_long"
    json.dumps(found, allow_nan=False)


def test_a_task_that_is_done_is_not_run_again_until_something_changes(monkeypatch, place, tmp_path):
    import lm_eval.evaluator

    runs: list[list[str]] = []
    evaluate = lm_eval.evaluator.simple_evaluate

    def counted(**options):
        runs.append([getattr(task, "task_name", None) or task.name for task in options["tasks"]])
        return evaluate(**options)

    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", counted)
    first = ours(place, "full", tmp_path, tasks="toy_long")
    assert ours(place, "full", tmp_path, tasks="toy_long") == first
    assert runs == [["toy_long"]]
    ours(place, "full", tmp_path, tasks="toy_long,toy_short")
    assert runs == [["toy_long"], ["toy_short"]]
    ours(place, "full", tmp_path, "limit=3", tasks="toy_long")
    ours(place, "adapter", tmp_path, "limit=3", tasks="toy_long")
    assert runs[2:] == [["toy_long"], ["toy_long"]]


def test_mistakes_are_told_before_a_model_is_loaded(monkeypatch, place, tmp_path):
    monkeypatch.setattr("lm_eval.api.registry.get_model", lambda name: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=r"no task 'toy_lang'.*include_path"):
        ours(place, "full", tmp_path, tasks="toy_lang")
    with pytest.raises(UserError, match=r"the task 'nowhere'.*somebody/something.*HF_HOME"):
        ours(place, "full", tmp_path, tasks="nowhere")
    (tmp_path / "leaderboard").mkdir()
    (tmp_path / "leaderboard" / "raw.json").write_text("{")
    with pytest.raises(UserError, match=r"raw\.json is damaged"):
        ours(place, "full", tmp_path, tasks="toy_long")
    for changes, said in (
        (["leaderboard.tasks=[]"], "leaderboard.tasks is empty"),
        (["leaderboard.include_path=nowhere"], "there is no folder nowhere"),
    ):
        with pytest.raises(UserError, match=said):
            leaderboard.run(parse(conf.compose("evaluate", [f"model={place / 'full'}", *changes])), tmp_path)
    served = ["model=m", "output=o", "answer.base_url=http://localhost:1/v1"]
    with pytest.raises(UserError, match="give that as MODEL"):
        leaderboard.run(parse(conf.compose("evaluate", served)), tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"zephyr\[evaluate\]"):
        ours(place, "full", tmp_path, tasks="toy_long")


def test_a_model_that_cannot_be_read_is_named(place, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((place / "full" / "config.json").read_text())
    with pytest.raises(UserError, match=r"cannot load .*broken"):
        ours(tmp_path, "broken", tmp_path / "out", f"leaderboard.include_path={place / 'tasks'}", tasks="toy_long")


def test_shots_and_metrics_are_the_leaderboards():
    """lm-eval keeps the leaderboard's shots in a group of its own; the metrics must be ones that its tasks have."""
    from lm_eval.tasks import __file__ as here
    from lm_eval.tasks._yaml_loader import load_yaml

    tasks = Path(here).parent
    group = yaml.safe_load((tasks / "benchmarks" / "openllm.yaml").read_text())["task"]
    shots = {entry["task"]: entry["num_fewshot"] for entry in group}
    assert {name.removesuffix("_mc2"): standard.shots for name, standard in leaderboard.STANDARD.items()} == shots
    assert conf.compose("evaluate", ["model=m"])["leaderboard"]["tasks"] == list(leaderboard.STANDARD)
    files = {
        "arc_challenge": "arc/arc_challenge",
        "hellaswag": "hellaswag/hellaswag",
        "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2",
        "winogrande": "winogrande/default",
        "gsm8k": "gsm8k/gsm8k",
    }
    for name, file in files.items():
        task = load_yaml(tasks / f"{file}.yaml", resolve_func=False)
        filters = [entry["name"] for entry in task.get("filter_list", [{"name": "none"}])]
        having = {f"{metric['metric']},{kind}" for metric in task["metric_list"] for kind in filters}
        assert task["task"] == name
        assert leaderboard.STANDARD[name].metric in having
    published = [standard.published for standard in leaderboard.STANDARD.values()]
    assert published[:4] == [62.03, 84.52, 61.44, 57.44]
