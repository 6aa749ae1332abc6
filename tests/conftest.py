import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches the network
os.environ["WANDB_MODE"] = "offline"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=2, help="kill -9 a run so many times, and a process that saves twice as often"
    )


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """A feedback run without a fault: its folder, and the server with what that saw."""
    from tests.collecting import ask
    from tests.openai_server import Server

    with Server() as server:
        yield ask(server.url, tmp_path_factory.mktemp("whole")), server
