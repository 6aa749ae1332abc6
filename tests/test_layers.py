"""Import direction: what each part may use of the others. Everything points one way."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "zephyr"
APEX = ("__init__.py", "errors.py", "settings.py", "run.py")  # the leaves all may use, and the one that uses all
EVERYWHERE = {"zephyr", "zephyr.errors", "zephyr.settings"}
ALLOWED = {  # part -> others that it may import, or modules of others; errors and settings all may
    "demo": {
        *("data.render", "generation", "observe.metrics", "command"),
        *("feedback.local", "feedback.pool", "feedback.server"),  # what serves a model in this process
    },
    "data": set(),
    "command": set(),
    "prepare": {"data", "command", "progress"},
    "progress": set(),
    "feedback": {
        *("data", "demo", "redact", "command", "progress", "observe.weights_and_biases"),
        *("chat", "generation"),
    },
    "evaluate": {"evaluation", "feedback", "command", "observe.weights_and_biases"},
    "evaluation": {"feedback", "chat", "data", "demo", "models", "observe", "progress"},
    "study": {"evaluation", "data", "demo", "observe", "sweep", "command"},
    "models": {"data.batch"},
    "objectives": set(),
    "redact": set(),
    "console": set(),
    "early": {"demo", "data.sources", "planning.gpus"},
    "distributed": set(),
    "training": {"data.batch"},
    "sft": {"training", "data.batch", "models.logps"},
    "dpo": {"training", "data.batch", "models", "objectives"},
    "generation": {"data.render"},
    "chat": {"generation", "data.render", "checkpoints"},
    "merge": {"data", "models", "export", "chat"},
    "checkpoints": {"distributed"},
    "strategy": {"checkpoints", "distributed"},
    "observe": {
        "planning.flops",
        "planning.gpus",
        "data.batch",
        "data.render",
        "generation",
        "models.logps",
        "checkpoints.randomness",
        "redact",
    },
    "export": {"models"},
    "record": {"data.modules", "export", "observe.metrics"},
    "placement": {"distributed", "models.policy"},
    "planning": {"demo", "data", "models", "objectives", "training", "sft", "dpo"},
    "assemble": {
        "data",
        "models",
        "distributed",
        "planning.estimate",
        "objectives",
        "placement",
        "sft",
        "dpo",
        "training",
    },
    "rank_log": {"distributed"},
    "worker": {"distributed", "rank_log", "run"},
    "launch": {"worker", "data.pool"},
    "sweep": {"redact", "distributed", "launch"},
}


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in inner if (ROOT / (name.replace(".", "/") + ".py")).exists()} or {
                node.module or ""
            }
    return names


def test_imports_point_one_way():
    files = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in APEX]
    assert len(files) > 15
    for path in files:
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        inner = {name for name in imports(path) if name.split(".")[0] == "zephyr"} - EVERYWHERE
        allowed = ALLOWED[part] | {part}
        strangers = {n for n in inner if not any((n + ".").startswith(f"zephyr.{a}.") for a in allowed)}
        assert not strangers, f"{path.relative_to(ROOT)} imports {sorted(strangers)}"


def test_the_configuration_library_stays_at_the_door():
    users = {
        str(path.relative_to(ROOT))
        for path in [ROOT / "train.py", *ROOT.glob("conf/**/*.py"), *PACKAGE.rglob("*.py")]
        if {"hydra", "omegaconf"} & {n.split(".")[0] for n in imports(path)}
    }
    assert users == {"train.py", "conf/__init__.py"}


def test_heavy_and_optional_packages_are_imported_late():
    """Settings answer without torch; the trainer starts without wandb, peft, bitsandbytes, trl."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        top = {n.names[0].name.split(".")[0] for n in tree.body if isinstance(n, ast.Import)}
        top |= {(n.module or "").split(".")[0] for n in tree.body if isinstance(n, ast.ImportFrom)}
        assert not top & {"wandb", "peft", "bitsandbytes", "trl", "flash_attn"}, path
        if path.name in ("settings.py", "errors.py"):
            assert not top & {"torch", "lightning", "transformers"}, path
