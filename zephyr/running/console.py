"""What a run says while it works."""

import logging
import sys
import warnings

from transformers.utils.logging import disable_progress_bar

_log = logging.getLogger("zephyr")


def speak() -> None:
    """Let Zephyr speak on standard error, one plain line at a time, and Lightning only when something is wrong."""
    if not _log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        _log.addHandler(handler)
        _log.setLevel(logging.INFO)
        _log.propagate = False
    for noisy in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    disable_progress_bar()
    for noise in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own, on torch 2.13
        r"Found \d+ module\(s\) in eval mode",  # the reference, as it should be
        r"It is recommended to use `self.log\(.*sync_dist=True",  # the sums are over all processes already
        r".*dataloader is not resumable",  # it is: the data module keeps the position
        r"The '\w+_dataloader' does not have many workers",  # packing is fast enough in the loop
    ):
        warnings.filterwarnings("ignore", noise)
