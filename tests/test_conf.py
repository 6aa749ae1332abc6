"""Every configuration composes, every key has a reader, and published recipes stay what they are."""

import ast
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import conf
from zephyr import settings
from zephyr.evaluation import settings as evaluation
from zephyr.feedback import settings as feedback
from zephyr.prepare import settings as preparations
from zephyr.prepare import ultrachat, ultrafeedback
from zephyr.settings import build, parse
from zephyr.study import settings as studies

ROOT = Path(__file__).parents[1]
CONF, SNAPSHOTS = ROOT / "conf", ROOT / "tests" / "snapshots"
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))
PREPARATIONS = {
    "ultrachat": preparations.Dialogues,
    "ultrafeedback": preparations.Feedback,
    "truecaser": preparations.Casing,
}
RUNS = list(product(RECIPES, ["sft", "dpo"]))


def load(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", list(overrides))
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def test_the_recipes_of_the_contract_exist():
    assert {"demo", "zephyr-7b-beta", "zephyr-7b-beta-handbook", "zephyr-7b-qlora"} <= set(RECIPES)


@pytest.mark.parametrize(("recipe", "stage"), RUNS)
def test_every_key_of_a_recipe_binds_to_a_setting_of_its_type(recipe, stage):
    parsed = parse(load(f"recipe={recipe}", f"stage={stage}"))
    assert (parsed.recipe, parsed.stage) == (recipe, stage)


@pytest.mark.parametrize(("recipe", "stage"), RUNS)
def test_published_numbers_do_not_move(recipe, stage):
    """To accept a change on purpose: python -m tests.test_conf, and say in CHANGELOG.md why."""
    assert load(f"recipe={recipe}", f"stage={stage}") == yaml.safe_load(
        (SNAPSHOTS / f"{recipe}-{stage}.yaml").read_text()
    )


def test_every_option_of_every_group_composes():
    """Each YAML under conf/ takes part in some run that parses."""
    files = {path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml")}
    assert len(files) >= 18
    used = {"train"}
    for group in ("trainer", "logger", "objective", "reference", "sweep"):
        for option in [path.stem for path in (CONF / group).glob("*.yaml")]:
            parse(load(f"{group}={option}", "stage=dpo"))
            used.add(f"{group}/{option}")
    for recipe, stage in RUNS:
        used |= {f"recipe/{recipe}", f"recipe/{recipe}/{stage}", f"stage/{stage}"}
    evaluation.parse(conf.compose("evaluate", ["model=m", "output=o", "answer.base_url=http://localhost:1/v1"]))
    used |= {"evaluate"}
    studies.parse(conf.compose("study/ablation", []))
    used |= {"study/ablation"}
    for command, kind in PREPARATIONS.items():
        build(kind, conf.compose(f"prepare/{command}", ["input=a.jsonl", "output=b"]))
        used.add(f"prepare/{command}")
    models = "models=[{name: a, base_url: 'http://a/v1'}]"
    parsed = feedback.parse(
        conf.compose("feedback", ["prompts=a", "output=b", models, "judge.model=j", "judge.path=c"])
    )
    assert parsed.limits == feedback.Limits(), "what the client takes where it is used without a configuration"
    used |= {"feedback", "backend/server", "limits/client"}
    assert files == used


@pytest.mark.parametrize(
    ("kind", "work"),
    [(preparations.ChatSplits, ultrachat.UltraChat), (preparations.PairSplits, ultrafeedback.UltraFeedback)],
)
def test_every_split_has_a_size(kind, work):
    assert [field.name for field in fields(kind)] == [split.name for split in work.splits]


def test_every_setting_is_read_by_the_program():
    """A field that no module reads would be a key without effect."""
    read = set()
    for path in [ROOT / "train.py", *(ROOT / "zephyr").rglob("*.py")]:
        if path.name != "settings.py" or path.parent.name == "feedback":  # which makes the client's pool of them
            read |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    known = {**vars(settings), **vars(preparations), **vars(evaluation), **vars(studies), **vars(feedback)}.values()
    kinds = [kind for kind in known if is_dataclass(kind) and not kind.__name__.endswith("Splits")]
    assert len(kinds) >= 12
    unread = {f"{kind.__name__}.{field.name}" for kind in kinds for field in fields(kind)} - {
        f"{kind.__name__}.{field.name}" for kind in kinds for field in fields(kind) if field.name in read
    }
    assert not unread


# The numbers of the sources, written down a second time: Tunstall et al. (2023), sections 4.3 and 4.4, and the
# alignment-handbook's recipes of January 2024.
PUBLISHED = {
    ("zephyr-7b-beta", "sft"): dict(lr=2e-5, schedule="cosine", warmup=0.1, epochs=1, batch=512, length=2048),
    ("zephyr-7b-beta", "dpo"): dict(lr=5e-7, schedule="linear", warmup=0.1, epochs=3, batch=32, length=1024, beta=0.1),
    ("zephyr-7b-beta-handbook", "sft"): dict(lr=2e-5, schedule="cosine", warmup=0.1, epochs=1, batch=128, length=2048),
    ("zephyr-7b-beta-handbook", "dpo"): dict(
        lr=5e-7, schedule="cosine", warmup=0.1, epochs=1, batch=128, length=1024, beta=0.01
    ),
    ("zephyr-7b-qlora", "sft"): dict(
        lr=2e-4, schedule="cosine", warmup=0.1, epochs=1, batch=64, length=2048, rank=16, alpha=16
    ),
    ("zephyr-7b-qlora", "dpo"): dict(
        lr=5e-6, schedule="cosine", warmup=0.1, epochs=1, batch=128, length=1024, beta=0.01, rank=128, alpha=128,
        optimizer="paged_adamw_32bit",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "stage"), PUBLISHED)
def test_recipes_are_those_of_their_sources(recipe, stage):
    s = parse(load(f"recipe={recipe}", f"stage={stage}"))
    found = {
        "lr": s.optimizer.lr, "schedule": s.optimizer.schedule, "warmup": s.optimizer.warmup_ratio,
        "epochs": s.trainer.max_epochs, "batch": s.data.batch_size, "length": s.data.max_length,
        "beta": s.objective and s.objective.beta, "optimizer": s.optimizer.name,
        "rank": s.model.lora and s.model.lora.rank, "alpha": s.model.lora and s.model.lora.alpha,
    }  # fmt: skip
    expected = {"beta": None, "optimizer": "adamw", "rank": None, "alpha": None, **PUBLISHED[recipe, stage]}
    assert found == expected
    assert s.optimizer.weight_decay == 0 and s.model.base == "mistralai/Mistral-7B-v0.1"
    assert s.data.train.endswith("train_sft" if stage == "sft" else "train_prefs")
    assert s.data.validation == s.data.train.replace("train_", "test_")
    if stage == "dpo":
        assert s.data.max_prompt_length == 512
    if recipe == "zephyr-7b-qlora":
        assert (s.model.quantization, s.model.lora.dropout, len(s.model.lora.target_modules)) == ("nf4", 0.05, 7)


def test_the_configuration_prints_fast_and_without_torch():
    command = [sys.executable, "-X", "importtime", "train.py", "--cfg", "job", "--resolve"]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 3 * 2  # 3 s is the promise, 0.4 s the measurement; twice for a busy machine
    assert yaml.safe_load(done.stdout) == load()
    assert "zephyr.settings" in done.stderr and " torch" not in done.stderr


if __name__ == "__main__":
    for recipe, stage in RUNS:
        text = yaml.safe_dump(load(f"recipe={recipe}", f"stage={stage}"), sort_keys=False)
        (SNAPSHOTS / f"{recipe}-{stage}.yaml").write_text(text)
