"""Functions run by several processes at once over gloo, as a launcher would start them."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def spawn(function: Callable[..., Any], processes: int, folder: Path, *args: Any) -> list[Any]:
    """What `function(*args)` returns on each of so many fresh processes, each of them one rank; by way of files."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_rank, (function, processes, port, folder, args), nprocs=processes)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def _rank(rank: int, function: Callable[..., Any], processes: int, port: int, folder: Path, args: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    torch.save(function(*args), folder / f"{rank}.pt")
