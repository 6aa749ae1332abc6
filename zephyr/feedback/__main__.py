"""AI feedback: `python -m zephyr.feedback prompts=FILE output=DIR 'models=[...]' judge.model=... judge.base_url=...`"""

import sys
from collections.abc import Sequence

from zephyr.command import outlived, status


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    return status(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    import conf  # composes with Hydra, which nothing in this package may import

    if {"-h", "--help"} & set(arguments):
        print(conf.describe("feedback"))
        return
    config = conf.compose("feedback", list(arguments))
    from zephyr.feedback.run import run

    run(config)


if __name__ == "__main__":
    sys.exit(outlived(lambda: main(sys.argv[1:])))
