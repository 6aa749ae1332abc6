"""Serve the demo's models, and its teacher as a judge, as an OpenAI-compatible server does: on this machine alone.

    python -m zephyr.demo.serve sft=outputs/demo/sft early=outputs/demo/sft/checkpoints/step-00000150
    python -m zephyr.demo.serve sft=outputs/demo/sft -- python -m zephyr.feedback ... judge.base_url={url}

With a command behind `--` it serves while that runs, and ends as it does. The command finds the server's address in the
variable ZEPHYR_DEMO_URL, and in place of {url} in its words. What is served besides the models given is `teacher`,
which judges answers to the village's questions by its rules. The same request always gets the same answer.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from zephyr.command import status
from zephyr.demo import judge
from zephyr.errors import UserError, reason
from zephyr.feedback.local import Local, LocalServer
from zephyr.feedback.pool import Model
from zephyr.feedback.server import Refused

TEACHER = "teacher"
VARIABLE = "ZEPHYR_DEMO_URL"
_SAMPLING = ("temperature", "top_p", "max_tokens", "max_completion_tokens", "seed")
_LONGEST = 8 * 1024 * 1024  # bytes of a request


def main(arguments: Sequence[str]) -> int:
    """Serve until Ctrl-C, or while the command runs; its exit status, or 2 after a mistake of the user."""
    end = [*arguments, "--"].index("--")
    args, command = _parser().parse_args(arguments[:end]), list(arguments[end + 1 :])
    return status(lambda: asyncio.run(_serve(_folders(args.models), args.port, args.port_file, command)))


@contextlib.asynccontextmanager
async def serving(folders: dict[str, Path], port: int = 0) -> AsyncIterator[str]:
    """The address of a server of these models, by name, and of the teacher, while inside.

    Raises UserError at a folder without a model, and at a port that is taken.
    """
    models = {name: LocalServer(Local(folder)) for name, folder in folders.items()}
    app = web.Application(client_max_size=_LONGEST)
    app.add_routes([web.get("/v1/models", _list), web.post("/v1/chat/completions", _complete)])
    app[_MODELS] = models
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    try:
        try:
            await site.start()
        except OSError as error:
            raise UserError(f"--port {port} cannot be had: {reason(error)}. Take another, or 0 for any.") from error
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()
        for model in models.values():
            await model.close()


_MODELS = web.AppKey("models", dict[str, LocalServer])


async def _list(request: web.Request) -> web.Response:
    names = [*request.app[_MODELS], TEACHER]
    return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})


async def _complete(request: web.Request) -> web.Response:
    try:
        body = await request.json()
        name, messages = body["model"], body["messages"]
        if not messages or not all(isinstance(message["content"], str) for message in messages):
            raise ValueError("messages must hold a text each")
    except (ValueError, KeyError, TypeError) as error:
        return _refusal(400, f"not a chat completion request: {reason(error)}")
    if name == TEACHER:
        return web.json_response(_judged(body))
    model = request.app[_MODELS].get(name)
    if model is None:
        return _refusal(404, f"there is no model {name!r}, but {', '.join([*request.app[_MODELS], TEACHER])}")
    asked = {key: body[key] for key in ("model", "messages", *_SAMPLING) if body.get(key) is not None}
    sent = json.dumps(asked, sort_keys=True).encode()
    try:
        answer = await model.complete(Model(name, ()), sent, hashlib.sha256(sent).hexdigest(), lambda: None)
    except (Refused, UserError) as error:
        return _refusal(400, str(error))
    return web.json_response(_completion(name, answer["choices"][0], answer["usage"]))


def _judged(body: dict[str, Any]) -> dict[str, Any]:
    said = judge.reply(body["messages"], "response_format" in body, bool(body.get("logprobs")))
    choice: dict[str, Any] = {"message": {"content": said.text}, "finish_reason": "stop"}
    if said.chances:
        likely = sorted(said.chances.items(), key=lambda item: -item[1])
        offered = [{"token": token, "logprob": math.log(chance)} for token, chance in likely]
        choice["logprobs"] = {"content": [{**offered[0], "top_logprobs": offered}]}
    # the rules count no tokens; words are near enough to see what judging takes
    words = sum(len(message["content"].split()) for message in body["messages"])
    return _completion(TEACHER, choice, {"prompt_tokens": words, "completion_tokens": len(said.text.split())})


def _completion(name: str, choice: dict[str, Any], usage: dict[str, int]) -> dict[str, Any]:
    return {
        "object": "chat.completion",
        "model": name,
        "choices": [{"index": 0, **choice, "message": {"role": "assistant", **choice["message"]}}],
        "usage": {**usage, "total_tokens": sum(usage.values())},
    }


def _refusal(code: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=code)


async def _serve(folders: dict[str, Path], port: int, port_file: Path | None, command: list[str]) -> int:
    async with serving(folders, port) as url:
        if port_file is not None:
            beside = port_file.with_name(f".{port_file.name}.partial")
            beside.write_text(url.rpartition(":")[2].removesuffix("/v1") + "\n")
            beside.rename(port_file)  # whoever waits for it finds it whole
        if not command:
            print(f"{url}  {' '.join([*folders, TEACHER])}", flush=True)
            await asyncio.Event().wait()
        return await _run([word.replace("{url}", url) for word in command], url)


async def _run(command: list[str], url: str) -> int:
    """The command's exit status. Whatever ends this ends the command too."""
    try:
        process = await asyncio.create_subprocess_exec(*command, env={**os.environ, VARIABLE: url})
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {reason(error)}.") from error
    try:
        code = await process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        raise
    return code if code >= 0 else 128 - code


def _folders(given: Sequence[str]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for word in given:
        name, equals, folder = word.partition("=")
        if not equals or not name or name in folders or name == TEACHER:
            raise UserError(f"{word!r} is no model to serve: write name=folder, each name once, and none {TEACHER}.")
        folders[name] = Path(folder)
    return folders


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m zephyr.demo.serve", "%(prog)s [NAME=FOLDER ...] [--port N] [--port-file FILE] [-- COMMAND ...]"
    )
    parser.description = "Serve models of the demo and its teacher on this machine."
    add = parser.add_argument
    add(
        "models", nargs="*", metavar="NAME=FOLDER", help="folder of a model, an adapter, a training run or a checkpoint"
    )
    add("--port", type=int, default=0, help="0, the default, is any that is free")
    add("--port-file", type=Path, metavar="FILE", help="gets the port's number once the server answers")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
