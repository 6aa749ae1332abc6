"""vLLM on a folder of weights: its own server on this machine, started when it is first asked, stopped at the end.

For GPUs, where it answers many more at once than transformers does. What it says depends a little on what else it
writes at the same time, as its kernels round differently in other batches.
"""

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from zephyr.chat import find_model
from zephyr.errors import UserError
from zephyr.feedback.local import fingerprint
from zephyr.feedback.pool import Answering, Limits, Model
from zephyr.feedback.server import Endpoint, Server

_LOAD_SECONDS = 1800.0  # for large weights from a slow disk, and for its compilation
_END_SECONDS = 20.0


@dataclass(frozen=True)
class Engine:
    """vLLM for the model in the folder `path`, or in `model/` below it."""

    path: Path
    concurrency: int = 64
    requests_per_minute = None
    tokens_per_minute = None

    @cached_property
    def identity(self) -> str:
        """SHA-256 of its files, as of a model in this process; another engine's answers are other answers."""
        return "vllm " + fingerprint(find_model(self.path)).hex()

    def open(self, limits: Limits, secrets: set[str]) -> Answering:
        """Raises UserError where there is no model, no vLLM, or only an adapter."""
        return EngineServer(self, limits, secrets)


class EngineServer:
    """The engine of one folder."""

    def __init__(self, source: Engine, limits: Limits, secrets: set[str]) -> None:
        self.endpoint = source
        self.folder = find_model(source.path)
        if not (self.folder / "config.json").is_file():
            raise UserError(f"{self.folder} is no whole model, which vLLM needs: python -m zephyr.merge makes one.")
        beside = Path(sys.executable).with_name("vllm")
        found = str(beside) if beside.exists() else shutil.which("vllm")
        if found is None:
            raise UserError(
                "engine=vllm needs vLLM: pip install vllm, on a machine with a GPU; or engine=transformers."
            )
        self._command, self._limits, self._secrets = found, limits, secrets
        self._started: asyncio.Task[Server] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    async def complete(self, model: Model, body: bytes, key: str, free: Callable[[], None]) -> dict[str, Any]:
        """As a server's. Raises UserError, with vLLM's last words, where it does not start."""
        if self._started is None:
            self._started = asyncio.create_task(self._start())
        server = await asyncio.shield(self._started)
        asked = json.dumps({**json.loads(body), "model": str(self.folder)}).encode()  # several names may share it
        completion = await server.complete(model, asked, key, free)
        return {**completion, "model": f"{model.name}@{self.endpoint.identity[5:17]}"}

    async def _start(self) -> Server:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - read when it fails, held as long as the process
        command = [self._command, "serve", str(self.folder), "--host", "127.0.0.1", "--port", str(port)]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL)
        print(f"Starting vLLM on {self.folder}.", file=sys.stderr)
        deadline = time.monotonic() + _LOAD_SECONDS
        while not await asyncio.to_thread(_ready, f"http://127.0.0.1:{port}/health"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"vLLM does not start on {self.folder}: {self._last_words()}")
            await asyncio.sleep(0.2)
        return Server(Endpoint(f"http://127.0.0.1:{port}/v1", concurrency=self.endpoint.concurrency), self._limits,
                      self._secrets)  # fmt: skip

    def _last_words(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1][:500] if lines else "it said nothing."

    async def close(self) -> None:
        """Ends the engine."""
        if self._started is not None:
            self._started.cancel()
            started = await asyncio.gather(self._started, return_exceptions=True)
            if isinstance(started[0], Server):
                await started[0].close()
        if self._process is not None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, _END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._log is not None:
            self._log.close()


def _ready(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
