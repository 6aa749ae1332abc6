import pytest
import torch

from zephyr.training.schedule import schedule


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_rates_are_those_of_transformers(name, warmup):
    from transformers import get_scheduler

    def rates(make):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        scheduler = make(optimizer)
        found = []
        for _ in range(10):
            found.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        return found

    theirs = rates(lambda optimizer: get_scheduler(name, optimizer, warmup, 10))
    assert rates(lambda optimizer: schedule(name, optimizer, warmup, 10)) == pytest.approx(theirs)
    assert theirs[0] == (0.0 if warmup else 2.0) and theirs[warmup] == 2.0
