"""Talk to a model: `python -m zephyr.chat PATH`.

PATH is a folder that training wrote, a checkpoint in it, any other transformers model with a chat template, a PEFT
adapter, or either of these on the hub: owner/name, owner/name@revision.
With `--prompt`, or with a prompt piped in, standard output gets the answer and nothing else.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zephyr.errors import UserError, reason

if TYPE_CHECKING:
    from zephyr.data.render import Message

HUB = re.compile(r"(?P<repo_id>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.-]+))?")
HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer."


def main(arguments: list[str] | None = None) -> int:
    """Chat as the arguments say; the exit status is 2 after a mistake of the user."""
    args = _parser().parse_args(arguments)
    try:
        folder = find_model(args.path)
        prompt = args.prompt
        if prompt is None and not sys.stdin.isatty():
            prompt = sys.stdin.read()
        if prompt is not None and not prompt.strip():
            raise UserError("The prompt is empty: give --prompt TEXT, or pipe a text in.")
        system = [{"role": "system", "content": args.system}] if args.system is not None else []
        model, tokenizer = load(folder, args.device)
        _check_template(tokenizer, system)

        def answer(conversation: "list[Message]") -> Iterator[str]:
            from zephyr.generation.generate import stream

            return stream(model, tokenizer, conversation, args.max_new_tokens, args.temperature, args.top_p)

        if args.seed is not None:
            import torch

            torch.manual_seed(args.seed)
        if prompt is None:
            _converse(answer, system, folder)
        else:
            for text in answer([*system, {"role": "user", "content": prompt.strip()}]):
                print(text, end="", flush=True)
            print(flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left, which is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def find_model(path: Path) -> Path:
    """The folder `path`, or `model/` in it, that holds a model or an adapter, or a checkpoint. Else UserError.

    Of a name of the hub (owner/name@revision) the folder is fetched, or taken from the hub's local cache.
    """
    if not path.exists():
        if found := HUB.fullmatch(str(path)):
            return _fetched(**found.groupdict())
        raise UserError(f"There is no folder {path}. Give one that holds a model, such as outputs/demo/dpo.")
    if _holds_model(path) or _is_checkpoint(path):
        return path
    if _holds_model(path / "model"):
        return path / "model"
    message = f"{path} holds no model: it has neither config.json nor adapter_config.json."
    below = sorted(path.glob("*/model")) + sorted(path.glob("*/*/model"))
    near = [path.parent, path.parent / "model", *below]
    suggestions = " or ".join(str(folder) for folder in near if _holds_model(folder))
    raise UserError(message + (f" Did you mean {suggestions}?" if suggestions else ""))


def _fetched(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub's client has a dozen kinds, all of which mean: not to be had
        raise UserError(
            f"There is no folder {repo_id}, and no model of that name can be had from the hub: {reason(error)} "
            "Check the name and the network, or set HF_TOKEN where it is gated."
        ) from error
    if not _holds_model(folder):
        raise UserError(f"{repo_id} on the hub holds no model: it has neither config.json nor adapter_config.json.")
    return folder


def load(folder: Path, device: str = "auto") -> tuple[Any, Any]:
    """The model, in the dtype it was saved in, on its device, and its tokenizer.

    An adapter's base model is loaded from the place and revision that its adapter_config.json names. A checkpoint's
    weights are put into the model that its run left in the end. Raises UserError when a part is missing or cannot be
    read, or the tokenizer has no chat template.
    """
    if _is_checkpoint(folder):
        finished, tokenizer = load(_finished(folder), device)
        return _with_weights(finished, folder), tokenizer
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if device == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else mps
    logging.disable_progress_bar()
    adapter = folder / "adapter_config.json"
    try:
        target = torch.empty(0, device=device).device
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.chat_template is None:
            raise UserError(f"{folder} has no chat template (chat_template.jinja): it is not a chat model.")
        base, revision = str(folder), None
        if adapter.exists():
            config = json.loads(adapter.read_text(encoding="utf-8"))
            base, revision = config["base_model_name_or_path"], config.get("revision")
        model: Any = AutoModelForCausalLM.from_pretrained(base, revision=revision, dtype="auto")
        if adapter.exists():
            model = _with_adapter(model, folder)
    except UserError:
        raise
    except Exception as error:  # whatever kind: the files are the user's, and the reason is in the message
        raise UserError(f"Cannot load {folder} on {device}: {reason(error)}") from error
    return model.to(target).eval(), tokenizer


def _with_adapter(model: Any, folder: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(f"{folder} is an adapter, which needs peft: pip install peft") from error
    return PeftModel.from_pretrained(model, str(folder))


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _is_checkpoint(folder: Path) -> bool:
    return re.fullmatch(r"step-\d+", folder.name) is not None and (folder / "MANIFEST.json").is_file()


def _finished(checkpoint: Path) -> Path:
    """The whole model that the checkpoint's run has left."""
    folder = checkpoint.absolute().parents[1] / "model"
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        why = "its run trained an adapter" if adapter else f"its run has not left {folder}"
        raise UserError(f"{checkpoint} is a checkpoint, whose weights make no model by themselves, as {why}.")
    return folder


def _with_weights(model: Any, checkpoint: Path) -> Any:
    from zephyr.checkpoints.checkpoint import FolderCheckpointIO

    stored = FolderCheckpointIO().open(checkpoint)["state_dict"]
    for name, weight in model.state_dict().items():
        if f"policy.{name}" not in stored:
            raise UserError(f"{checkpoint} lacks {name}: it is not of the run that left {_finished(checkpoint)}.")
        stored[f"policy.{name}"].into(weight)
    return model


def _check_template(tokenizer: Any, system: "list[Message]") -> None:
    from jinja2 import TemplateError

    try:
        tokenizer.apply_chat_template([*system, {"role": "user", "content": "Hi"}], tokenize=False)
    except TemplateError as error:
        advice = " Leave out --system." if system else ""
        raise UserError(f"The model's chat template refuses this conversation: {error}.{advice}") from error


def _converse(answer: Any, system: "list[Message]", folder: Path) -> None:
    """Read, answer and remember until the user leaves."""
    import readline  # noqa: F401 - gives input() a history and line editing

    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"[bold]{folder}[/bold]\n[dim]{HELP}[/dim]")
    conversation = list(system)
    while True:
        try:
            console.print()
            text = input("\001\033[1;36m\002you >\001\033[0m\002 " if console.is_terminal else "").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            console.print()
            return
        if text == "/quit":
            return
        if text == "/reset":
            conversation = list(system)
            console.print("[dim]A new conversation.[/dim]")
        elif text:
            conversation.append({"role": "user", "content": text})
            said = _print_answer(console, answer(conversation))
            conversation.append({"role": "assistant", "content": said})


def _print_answer(console: Any, chunks: Iterator[str]) -> str:
    """Print an answer as it comes, until it ends or Ctrl-C stops it; what came is returned."""
    console.print("\n[bold green]zephyr >[/bold green] ", end="")
    said = ""
    try:
        for chunk in chunks:
            said += chunk
            visible = "".join(c for c in chunk if c.isprintable() or c in "\n\t")  # no escape codes
            console.print(visible, end="", markup=False, emoji=False, soft_wrap=True)
    except KeyboardInterrupt:
        chunks.close()  # type: ignore[attr-defined]
        console.print(" [dim](stopped)[/dim]", end="")
    console.print()
    return said


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m zephyr.chat", description="Talk to a model.", epilog=HELP)
    add = parser.add_argument
    temperature, top_p = _positive(float, zero=True), _positive(float, most=1.0)
    add("path", type=Path, metavar="PATH", help="folder of a model, an adapter, a training run or a checkpoint")
    add("--prompt", metavar="TEXT", help="answer this one prompt and exit")
    add("--system", metavar="TEXT", help="system message that opens the conversation")
    add("--max-new-tokens", type=_positive(int), default=512, metavar="N", help="default %(default)s")
    add("--temperature", type=temperature, default=0.7, metavar="T", help="default %(default)s; 0 is greedy")
    add("--top-p", type=top_p, default=0.95, metavar="P", help="nucleus to sample from, default %(default)s")
    add("--seed", type=int, help="makes the answers repeatable")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: the fastest there is")
    return parser


def _positive(kind: Any, zero: bool = False, most: float = float("inf")) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not (0 <= value <= most and (zero or value > 0)):
            raise ValueError
        return value

    parse.__name__ = f"{'non-negative' if zero else 'positive'} {kind.__name__}"
    return parse


if __name__ == "__main__":
    sys.exit(main())
