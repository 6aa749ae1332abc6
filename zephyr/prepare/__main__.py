"""Prepare data: `python -m zephyr.prepare ultrachat input=raw.jsonl output=data/ultrachat`.

A mistake ends with one message and status 2, Ctrl-C with 130, SIGTERM with 143; the same command then goes on.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import FrameType
from typing import NoReturn

from zephyr.errors import Stopped, UserError

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
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)
    try:
        _chosen(command, arguments[1:])()
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"Stopped by {stopped.signal.name}. The same command goes on.", file=sys.stderr)
        return 128 + stopped.signal
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno is None or error.filename is None:
            raise
        print(f"Error: {error.strerror}: {error.filename}", file=sys.stderr)
        return 2
    return 0


def usage() -> str:
    """The commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["Usage: python -m zephyr.prepare COMMAND key=value ...", *lines, "Keys: COMMAND --help"])


def _chosen(command: str, overrides: Sequence[str]) -> Callable[[], object]:
    """What the command line asks for: the one place that knows where configurations come from."""
    import conf  # composes with Hydra, which nothing in this package may import

    if {"-h", "--help"} & set(overrides):
        return lambda: print(conf.describe(f"prepare/{command}"))
    config = conf.compose(f"prepare/{command}", list(overrides))
    return lambda: import_module(f"zephyr.prepare.{command}").run(config)


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(signum)


if __name__ == "__main__":
    # Arrow's own pools keep what the largest rows took; the processes of the pool inherit this.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    sys.exit(main(sys.argv[1:]))
