"""What the ranks of tests/test_launch.py do in place of training: `python -m tests.rank_bodies FROZEN`."""

import os
import signal
import sys
import time
from pathlib import Path

from zephyr import distributed
from zephyr.errors import UserError
from zephyr.launching.worker import serve
from zephyr.running.rank_log import move


def mark(name, text=None):
    file = OUTPUT / f"{name}-{distributed.rank()}"
    file.with_suffix(".new").write_text(text or str(os.getpid()))
    file.with_suffix(".new").rename(file)


def total():
    import torch

    value = torch.tensor([10.0 ** distributed.rank()])
    torch.distributed.all_reduce(value)
    return value.item()


def trains():
    distributed.barrier()
    distributed.all_equal("the same")
    return total()


def takes_turns():
    with distributed.local_first():
        mark("turn")
        time.sleep(0.3)
    distributed.barrier()
    turns = [(OUTPUT / f"turn-{rank}").stat().st_mtime for rank in range(2)]
    assert turns[1] - turns[0] >= 0.3, turns
    return distributed.from_first(lambda: 7.0 + distributed.rank())


def first_fails():
    def make():
        assert distributed.rank() == 0, "rank 1 was asked too"
        raise KeyError("the cause")

    try:
        distributed.from_first(make)
    except distributed.PartnerFailed:
        mark("told")
        raise
    finally:
        if distributed.rank() == 0:
            time.sleep(1.5)  # as a logger may take to finish


def unequal():
    distributed.all_equal("abb"[distributed.rank()])


def breaks():
    total()
    if distributed.rank() == 1:
        print("the last words")
        mark("failed")
        raise ValueError("broken on purpose")
    if CONFIG["stuck"]:
        distributed._store.wait(["never"])
    total()


def killed():
    move(OUTPUT)
    total()
    if distributed.rank() == 1:
        if os.fork() == 0:  # a data worker
            mark("child")
            time.sleep(60)
        while not (OUTPUT / "child-1").exists():
            time.sleep(0.02)
        print("the last words")
        os.kill(os.getpid(), signal.SIGKILL)
    total()


def stuck():
    mark("ready")
    distributed._store.wait(["never"])


def alone_speaks():
    print(distributed.rank(), "loads")
    move(OUTPUT)
    print(distributed.rank(), "warns", file=sys.stderr)
    os.system("echo $RANK calls a program")
    return 0.25


def alone_lists():
    print(sys.argv[1], Path(sys.argv[1]).parent.stat().st_mode & 0o777)
    print({name: os.environ.get(name) for name in CONFIG["names"]}, "torch" in sys.modules)
    return 0.5


def alone_mistaken():
    raise UserError("data.train=nowhere does not exist.")


def alone_steps():
    received = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: received.append(signum))
    move(OUTPUT)
    if distributed.rank() == 0:
        print("terminal" if sys.stdout.isatty() else "no terminal")
    mark("ready")
    while not received:
        time.sleep(0.02)
    time.sleep(2.7 if distributed.rank() == 0 else 0.5)  # the step and its checkpoint; then rank 0's logger
    mark("received", str([int(signum) for signum in received]))
    sys.exit(128 + received[0])


def alone_deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    mark("ready")
    time.sleep(0.5)


def alone_stopped():
    if distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def alone_forks():
    mark("forked" if os.fork() == 0 else "ready")  # a data worker
    time.sleep(60)


def body(config):
    global CONFIG, OUTPUT
    CONFIG, OUTPUT = config, Path(config["output_dir"])
    if config["body"].startswith("alone"):
        return globals()[config["body"]]()
    with distributed.process_group("cpu"):
        return globals()[config["body"]]()


if __name__ == "__main__":
    serve(body, Path(sys.argv[1]))
