"""Import direction: what each part may use of the others. Everything points one way."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "zephyr"
EVERYWHERE = {"zephyr", "zephyr.errors", "zephyr.settings"}  # what all may use
ALLOWED = {  # package or module -> what it may import of those above it
    "redact": set(),
    "command": set(),
    "progress": set(),
    "distributed": set(),
    "objectives": set(),
    "demo": set(),
    "data": set(),
    "models": {"data.batch"},
    "training": {"data.batch"},
    "sft": {"training", "data.batch", "models.logps"},
    "dpo": {"training", "data.batch", "models", "objectives"},
    "checkpoints": {"command", "distributed"},
    "generation": {"data.render"},
    "planning": {"demo", "data", "models", "training", "sft", "dpo", "objectives"},
    "observe": {"planning", "data", "models.logps", "generation", "checkpoints.randomness", "redact"},
    "export": {"models"},
    "running": {
        *("demo", "data", "models", "training", "sft", "dpo", "objectives"),
        *("distributed", "checkpoints", "planning", "observe.metrics", "export"),
    },
    "run": {
        *("demo", "data", "models", "training", "distributed", "checkpoints", "planning"),
        *("observe", "export", "redact", "running", "command"),
    },
    "launching": {"run", "running.rank_log", "distributed", "data.pool", "redact"},
    "prepare": {"data", "command", "progress"},
    "chat": {"data.render", "checkpoints", "generation"},
    "merge": {"data", "models", "export", "chat"},
    "feedback": {"demo", "data", "generation", "chat", "observe.weights_and_biases", "redact", "command", "progress"},
    "demo.__main__": {"demo", "data.render", "generation", "observe.metrics"},
    "demo.serve": {"demo", "feedback.local", "feedback.pool", "feedback.server", "command"},
    "evaluation": {"demo", "data", "models", "chat", "feedback", "observe", "progress"},
    "evaluate": {"evaluation", "feedback", "observe.weights_and_biases", "command"},
    "study": {"demo", "data", "evaluation", "launching.sweep", "observe", "command"},
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


def part(path: Path) -> str:
    """The narrowest package or module of ALLOWED that a file belongs to."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return max((key for key in ALLOWED if (name + ".").startswith(f"{key}.")), key=len, default=name)


def test_imports_point_one_way():
    leaves = {"__init__.py", "errors.py", "settings.py"}
    files = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in leaves]
    assert len(files) > 15
    for path in files:
        inner = {name for name in imports(path) if name.split(".")[0] == "zephyr"} - EVERYWHERE
        allowed = ALLOWED[part(path)] | {part(path)}
        strangers = {n for n in inner if not any((n + ".").startswith(f"zephyr.{a}.") for a in allowed)}
        assert not strangers, f"{path.relative_to(ROOT)} imports {sorted(strangers)}"


def test_no_part_needs_itself_by_way_of_another():
    above: set[str] = set()
    for name, others in ALLOWED.items():
        assert {other.split(".")[0] for other in others} <= above, f"{name} stands above what it imports"
        above.add(name)


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
