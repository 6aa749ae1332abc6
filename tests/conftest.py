import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches the network
os.environ["WANDB_MODE"] = "offline"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=2, help="kill -9 a run so many times before comparing it (test_kill)")
