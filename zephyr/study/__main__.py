"""Make a study: `python -m zephyr.study ablation recipe=demo output=outputs/demo/study`."""

import sys
from collections.abc import Sequence

from zephyr.command import status

USAGE = """Usage: python -m zephyr.study ablation key=value ...
  ablation  dDPO without dSFT, dSFT once and twice, dDPO + dSFT, and dDPO for more epochs; over several seeds
Keys: ablation --help"""


def main(arguments: Sequence[str]) -> int:
    """Run the command; its exit status, 1 where a run failed."""
    study = arguments[0] if arguments else None
    if study in ("-h", "--help"):
        print(USAGE)
        return 0
    if study != "ablation":
        print(f"Error: {f'Unknown study {study!r}.' if study else 'Which study?'}\n{USAGE}", file=sys.stderr)
        return 2
    return status(lambda: _run(arguments[1:]))


def _run(overrides: Sequence[str]) -> int:
    import conf  # composes with Hydra, which nothing in this package may import

    if {"-h", "--help"} & set(overrides):
        print(conf.describe("study/ablation"))
        return 0
    config = conf.compose("study/ablation", list(overrides))
    from zephyr.study import ablation

    return ablation.run(config, lambda overrides: conf.compose("train", overrides))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
