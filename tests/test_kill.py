"""kill -9 at random moments: the resumed run ends with the bits of the uninterrupted one.

The long form is `python -m pytest tests/test_kill.py --kills 10`.
"""

import random
import time

import pytest

from tests.commands import kill, metrics, start, steps_done, train, weights, world


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, stage, request):
    kills, steps = request.config.getoption("kills"), 60
    overrides = [f"trainer.max_steps={steps}", "checkpoint.every_n_steps=4", "trainer.eval_every_n_steps=6"]
    folder = world(tmp_path)
    train(folder, stage, folder / "whole", *overrides)

    draw, moments = random.Random(stage), []
    while len(moments) < kills:
        process = start(folder, stage, folder / "killed", *overrides, "resume=auto")
        before = steps_done(folder / "killed")
        # somewhere in the next stretch of the run, at any point of a step, a validation or a checkpoint
        goal = before + draw.randint(0, 2 * steps // (kills + 1))
        while steps_done(folder / "killed") <= goal and process.poll() is None:
            time.sleep(draw.random() * 0.02)
        time.sleep(draw.random() * 0.05)
        if process.poll() is not None:
            break  # it was done before the moment came
        kill(process)
        moments.append(steps_done(folder / "killed"))
    train(folder, stage, folder / "killed", *overrides, "resume=auto")
    assert moments, "the run was never killed"
    assert weights(folder / "killed") == weights(folder / "whole"), moments
    assert metrics(folder / "killed") == metrics(folder / "whole"), moments
