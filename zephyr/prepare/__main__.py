"""Prepare data: `python -m zephyr.prepare ultrachat input=raw.jsonl output=data/ultrachat`."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from zephyr.command import status

COMMANDS = {
    "ultrachat": "dialogues: truecased, filtered, near-duplicates and evaluation prompts left out",
    "ultrafeedback": "preference pairs from completions with scores",
    "truecaser": "the word-case statistics that truecasing uses, counted on your own text",
}


def main(arguments: Sequence[str]) -> int:
    """Run a command; its exit status."""
    command = arguments[0] if arguments else None
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command not in COMMANDS:
        said = f"Unknown command {command!r}." if command else "Which data?"
        print(f"Error: {said}\n{usage()}", file=sys.stderr)
        return 2
    return status(lambda: _run(command, arguments[1:]))


def usage() -> str:
    """The commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["Usage: python -m zephyr.prepare COMMAND key=value ...", *lines, "Keys: COMMAND --help"])


def _run(command: str, overrides: Sequence[str]) -> None:
    import conf  # composes with Hydra, which nothing in this package may import

    if {"-h", "--help"} & set(overrides):
        print(conf.describe(f"prepare/{command}"))
        return
    config = conf.compose(f"prepare/{command}", list(overrides))
    import_module(f"zephyr.prepare.{command}").run(config)


if __name__ == "__main__":
    # Arrow's own pools keep what the largest rows took; the processes of the pool inherit this.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    sys.exit(main(sys.argv[1:]))
