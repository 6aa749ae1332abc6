"""A model in this process, asked as a server is. A thread beside the event loop answers what waits, many at once; who
has his answer makes room for the next.

An answer depends on its request alone, not on what else is in the batch: what is drawn at random is drawn from a
generator of the request's own. The weights are part of what the ledger knows a request by, so an answer of other
weights under the same name is never taken.
"""

import asyncio
import contextlib
import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zephyr.chat import find_model, load
from zephyr.errors import UserError, reason
from zephyr.feedback.pool import Answering, Limits, Model
from zephyr.feedback.server import Refused

if TYPE_CHECKING:
    from zephyr.generation.sampling import Sampling

_GATHER_SECONDS = 0.02  # without another request, after which writing begins: those of a prompt come together
_UNBOUNDED = 4096  # tokens of a completion that has no limit, as Request has it
_PARAMETERS = {"temperature", "top_p", "max_tokens", "max_completion_tokens", "seed"}
_KINDS = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")  # files that decide what a model says
_loading = threading.Lock()  # transformers imports its parts when they are first used: in one thread at a time
_turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # models on one device answer one after another


@dataclass(frozen=True)
class Local:
    """A model or an adapter in the folder `path`, or in `model/` below it."""

    path: Path
    rows: int = 64  # conversations in a batch
    requests_per_minute = None
    tokens_per_minute = None

    @property
    def concurrency(self) -> int:
        """More than a batch, so that there is one to choose: of conversations that are alike in length."""
        return 4 * self.rows

    @cached_property
    def identity(self) -> str:
        """SHA-256 of its files, in hexadecimal. Takes a second or two a gigabyte."""
        return fingerprint(find_model(self.path)).hex()

    def open(self, limits: Limits, secrets: set[str]) -> Answering:
        """Raises UserError where there is no model. It is loaded when it is first asked."""
        return LocalServer(self)


@dataclass(eq=False)
class _Job:
    """A request that waits."""

    name: str  # of the model
    body: dict[str, Any]
    size: int  # bytes
    seed: int
    done: "asyncio.Future[dict[str, Any]]"
    prompt: int = 0  # tokens


class LocalServer:
    """The model of one folder, loaded once."""

    def __init__(self, source: Local) -> None:
        self.endpoint = source
        self.folder = find_model(source.path)
        self._weights = source.identity[:12]  # read now, as later others' answers would wait meanwhile
        self._rows = source.rows  # of a batch; fewer once memory has run out
        self._waiting: list[_Job] = []
        self._changing = threading.Lock()  # what waits is added to here, and taken in the thread
        self._working: asyncio.Task[None] | None = None
        self._closed = threading.Event()
        self._thread = ThreadPoolExecutor(1, "model")
        self._loaded: tuple[Any, Any] | None = None

    async def complete(self, model: Model, body: bytes, key: str, free: Callable[[], None]) -> dict[str, Any]:
        """As a server's. Raises Refused for a prompt that the model cannot take, UserError where it cannot be used."""
        asked = json.loads(body)
        if strangers := asked.keys() - _PARAMETERS - {"model", "messages"}:
            raise UserError(
                f"model {model.name!r} answers in this process ({self.endpoint.path}), which knows no "
                f"{', '.join(sorted(strangers))}. Take it out of the model's parameters, or serve the model."
            )
        done = asyncio.get_running_loop().create_future()
        with self._changing:
            self._waiting.append(_Job(model.name, asked, len(body), int(key[:16], 16) >> 1, done))
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        return await done

    async def _work(self) -> None:
        """Until nothing waits."""
        loop = asyncio.get_running_loop()
        try:
            known = 0
            while known < len(self._waiting):  # so that the batch is full from its first token
                known = len(self._waiting)
                await asyncio.sleep(_GATHER_SECONDS)
            while self._waiting and not self._closed.is_set():
                await loop.run_in_executor(self._thread, self._answer, loop)
        except Exception as error:  # of the model as a whole: who waits for it is told
            with self._changing:
                waiting, self._waiting = self._waiting, []
            for job in waiting:
                _settle(job, error)
        finally:
            self._working = None

    def _answer(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answer what waits, and what comes in meanwhile, in the thread."""
        with _loading:
            import torch

            from zephyr.generation.generate import respond

            self._loaded = self._loaded or load(self.folder)
        model, tokenizer = self._loaded
        numbers = count()
        open_: dict[int, _Job] = {}  # what has no answer yet

        def more(places: int) -> "list[tuple[list[int], Sampling]]":
            rows: list[tuple[list[int], Sampling]] = []
            while not rows and (jobs := self._take(places)):
                for job in jobs:
                    try:
                        rows.append(self._prepared(job))
                    except Refused as refused:
                        loop.call_soon_threadsafe(_settle, job, refused)
                        continue
                    open_[next(numbers)] = job
            return rows

        try:
            with _turns[str(model.device)]:
                for number, tokens, ended in respond(model, tokenizer, self._rows, more, self._closed.is_set):
                    job = open_.pop(number)
                    loop.call_soon_threadsafe(_settle, job, self._completion(job, tokens, ended))
            return
        except torch.OutOfMemoryError:
            pass  # and only behind this block are the tensors of the attempt gone
        except BaseException:
            self._give_back(open_)
            raise
        torch.cuda.empty_cache()
        if len(open_) == 1:
            refused = Refused(f"{self.folder}: the device's memory does not hold this one conversation.")
            loop.call_soon_threadsafe(_settle, open_.popitem()[1], refused)
        self._rows = max(1, min(self._rows, len(open_)) // 2)
        self._give_back(open_)

    def _take(self, places: int) -> list[_Job]:
        """The request that has waited longest, and those nearest to it in length: little of the batch is padding."""
        with self._changing:
            waiting = [job for job in self._waiting if not job.done.done()]  # who asked may have gone
            jobs = sorted(waiting, key=lambda job: abs(job.size - waiting[0].size))[:places]
            self._waiting = [job for job in waiting if job not in jobs]
        return jobs

    def _give_back(self, jobs: Mapping[int, _Job]) -> None:
        with self._changing:
            self._waiting = [*jobs.values(), *self._waiting]

    def _completion(self, job: _Job, tokens: list[int], ended: bool) -> dict[str, Any]:
        assert self._loaded is not None
        text = self._loaded[1].decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return {
            "model": f"{job.name}@{self._weights}",
            "choices": [{"message": {"content": str(text)}, "finish_reason": "stop" if ended else "length"}],
            # the end-of-turn token was written too
            "usage": {"prompt_tokens": job.prompt, "completion_tokens": len(tokens) + ended},
        }

    def _prepared(self, job: _Job) -> "tuple[list[int], Sampling]":
        """The prompt's tokens, and how to write behind them. Raises Refused."""
        from zephyr.generation.sampling import Sampling

        assert self._loaded is not None
        model, tokenizer = self._loaded
        try:
            row = tokenizer.apply_chat_template(job.body["messages"], add_generation_prompt=True, return_dict=True)
        except Exception as error:  # of Jinja or of the tokenizer: this conversation is not one that it knows
            raise Refused(f"{self.folder}: its chat template refuses the conversation: {reason(error)}") from error
        prompt: list[int] = row["input_ids"]
        job.prompt = len(prompt)
        window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        room = window - len(prompt) if window else None
        if room is not None and room < 1:
            raise Refused(f"{self.folder}: a prompt of {len(prompt):,} tokens; the model's context is {window:,}.")
        given = job.body.get("max_completion_tokens") or job.body.get("max_tokens") or _UNBOUNDED
        most = given if room is None else min(given, room)
        return prompt, Sampling(most, job.body.get("temperature", 1.0), job.body.get("top_p", 1.0), job.seed)

    async def close(self) -> None:
        """Stops writing what nobody waits for any more, and gives the memory back."""
        self._closed.set()
        if self._working is not None:
            self._working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._working
        # loading cannot be stopped, and nobody has to wait for it
        await asyncio.to_thread(self._thread.shutdown, wait=self._loaded is not None)
        self._loaded = None


def fingerprint(folder: Path) -> bytes:
    """SHA-256 over the files of a model; of an adapter, its base's too where that is a folder."""
    names = sorted(file for file in folder.iterdir() if file.suffix in _KINDS and file.is_file())
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_digest, names))
    total = hashlib.sha256()
    for file, digest in zip(names, digests, strict=True):
        total.update(file.name.encode() + b"\0" + digest)
    for base in _bases(folder):
        total.update(fingerprint(base))
    return total.digest()


def _settle(job: _Job, outcome: dict[str, Any] | Exception) -> None:
    if job.done.done():  # who asked has gone
        return
    if isinstance(outcome, Exception):
        job.done.set_exception(outcome)
    else:
        job.done.set_result(outcome)


def _bases(folder: Path) -> Iterator[Path]:
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        try:
            base = Path(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{adapter} names no base model: {reason(error)}") from error
        if base.is_dir() and not base.samefile(folder):
            yield base


def _digest(file: Path) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()
