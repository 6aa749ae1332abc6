"""How fast data becomes steps: tokenising against the bare Rust tokenizer, a start from the cache, packing, batches.

`python -m benchmarks.data [--dialogues N] [--chats FILE] --output FILE`: a table, and the same as JSON. Without
`--chats`, the dialogues are drawn from an invented vocabulary, as long as UltraChat's are in the mean.

What loads torch is imported where it is needed: each process that tokenises reads this file again as it starts, as it
does train.py, and would be charged with the seconds that takes.
"""

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from zephyr import settings
from zephyr.data import encode, sources
from zephyr.data.encode import ConversationRows, Options
from zephyr.data.packing import best_fit, pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from zephyr.data.modules import ChatData

LENGTH = 2048  # tokens of a packed row
VOCABULARY = 32_000
OPTIONS = Options(LENGTH, 0, False, None, 0, False)


def words(draw: random.Random, count: int = 40_000) -> list[str]:
    """Invented words, which a tokenizer splits as it splits a language's."""
    syllables = ["".join(s) for s in itertools.product("bcdfghklmnprstvw", "aeiou", ["", "n", "r", "s", "l"])]
    return ["".join(draw.choices(syllables, k=draw.choice((1, 1, 2, 2, 2, 3, 3, 4)))) for _ in range(count)]


def dialogues(count: int, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """Conversations of two to eight turns; lengths are lognormal, words as frequent as Zipf's law has them."""
    draw = random.Random(seed)
    vocabulary = words(draw)
    weights = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(len(vocabulary))))
    for _ in range(count):
        messages = []
        for turn in range(2 * draw.choice((1, 2, 3, 3, 4))):
            size = int(draw.lognormvariate(3.3 if turn % 2 == 0 else 4.9, 0.7)) + 1
            text = draw.choices(vocabulary, cum_weights=weights, k=size)
            sentences = (" ".join(text[i : i + 12]).capitalize() for i in range(0, size, 12))
            messages.append({"role": ("user", "assistant")[turn % 2], "content": ". ".join(sentences) + "."})
        yield messages


def trained(texts: Iterator[str]) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of these texts, in Zephyr's format."""
    from transformers import PreTrainedTokenizerFast

    from zephyr.data.render import control_tokens, template

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_special_tokens([AddedToken("</s>", normalized=False), AddedToken("<pad>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template(control_tokens(tokenizer))
    return tokenizer


def bare(tokenizer: Any, texts: list[str]) -> int:
    """Tokens of rendered texts: the Rust tokenizer on all cores, with nothing done with what it finds."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    parts = (texts[first : first + 512] for first in range(0, len(texts), 512))
    encode_batch = partial(tokenizer.backend_tokenizer.encode_batch, add_special_tokens=False)
    return sum(len(encoding) for part in parts for encoding in encode_batch(part))


def tokenising(tokenizer: Any, paths: list[Path]) -> dict[str, Any]:
    """Zephyr's rate from file to arrays on all cores, beside the bare tokenizer's on rendered texts.

    A round takes the dialogues of one of the files, the bare tokenizer first.
    """
    from zephyr.data.render import chat_format

    form, cores = chat_format(tokenizer), encode.cores()
    encoder = form.encoder()

    def whole(path: Path) -> int:
        done = encode.encoded(sources.chunks([path]), ConversationRows, form, OPTIONS, cores)
        return sum(e.counts["tokens"] + e.counts["tokens_cut"] for e in done)

    out: dict[str, Any] = {"dialogues": 0, "tokens": 0, "rounds": []}
    for path in paths:
        texts = [encoder.text(sources.conversation(row))[0] for row in sources.read([path])]
        tokens, *of_bare = timed(bare, tokenizer, texts)
        same, *of_zephyr = timed(whole, path)
        assert same == tokens
        out["rounds"].append({"bare": of_bare, "zephyr": of_zephyr, "tokens": tokens})
        out["dialogues"] += len(texts)
        out["tokens"] += tokens
    for place, unit in enumerate(("second", "CPU second")):
        rates = {n: [r["tokens"] / r[n][place] for r in out["rounds"]] for n in ("bare", "zephyr")}
        out[f"tokens a {unit}"] = {name: statistics.median(each) for name, each in rates.items()}
        share = statistics.median(z / b for z, b in zip(rates["zephyr"], rates["bare"], strict=True))
        out[f"tokens a {unit}"]["share of bare"] = share
    return out


def timed(function: Callable[..., int], *arguments: Any) -> tuple[int, float, float]:
    """What a function returns, and its seconds and CPU seconds, those of its ended processes among them."""
    began, cpu = time.perf_counter(), _cpu()
    found = function(*arguments)
    return found, time.perf_counter() - began, _cpu() - cpu


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def from_cache(tokenizer: Any, chats: Path, cache: Path) -> dict[str, Any]:
    """Seconds of the first start, which tokenises, and of the second, which does not; both hash and pack."""
    from zephyr.data.modules import ChatData

    data = settings.ChatData(
        train=str(chats), validation=None, max_length=LENGTH, batch_size=128, micro_batch_tokens=8 * LENGTH,
        system=None, bad_rows="error", workers=0, cache=str(cache), loss_on="assistant",
    )  # fmt: skip
    seconds = []
    for _ in range(2):
        module = ChatData(data, tokenizer, 1.0, None, 0)
        started = time.perf_counter()
        module.load()
        seconds.append(time.perf_counter() - started)
    return {"first start (s)": seconds[0], "second start (s)": seconds[1], **steps(module), **packing(module)}


def steps(module: "ChatData") -> dict[str, Any]:
    """CPU time to make one step, and how long a loop waits for it that computes for a second a step."""
    from zephyr.data.modules import Steps

    made = Steps(module.train, 128, module.settings.micro_batch_tokens, 6, 0)
    started = time.process_time()
    for step in range(len(made)):
        made[step]
    cpu = (time.process_time() - started) / len(made)
    waits = []
    module.max_steps = 12
    loader = iter(module.train_dataloader())
    for _ in range(12):
        started = time.perf_counter()
        next(loader)
        waits.append(time.perf_counter() - started)
        time.sleep(1.0)
    return {
        "step of 128 rows (ms of CPU)": 1e3 * cpu,
        "waiting for the first step (ms)": 1e3 * waits[0],
        "longest wait of a later step (ms)": 1e3 * max(waits[1:]),
    }


def packing(module: "ChatData") -> dict[str, Any]:
    """How full the rows are, of the dialogues and of lengths after a lognormal law."""
    draw = np.random.default_rng(0)
    table = module.train.table  # type: ignore[attr-defined]
    laws = {"dialogues": table.lengths("ids").tolist()}
    for mean, spread in ((900, 0.6), (1100, 0.5), (1250, 0.5)):
        law = draw.lognormal(np.log(mean) - spread**2 / 2, spread, 200_000).astype(int)
        laws[f"lognormal, mean {mean}, sigma {spread}"] = np.clip(law, 20, LENGTH).tolist()
    out = {}
    for name, lengths in laws.items():
        started = time.process_time()
        rows = pack(lengths, LENGTH)
        out[name] = {
            "fill": sum(lengths) / LENGTH / len(rows),
            "fill of best fit": sum(lengths) / LENGTH / len(best_fit(lengths, LENGTH)),
            "no packing can exceed": sum(lengths) / LENGTH / lower_bound(lengths),
            "seconds of CPU": time.process_time() - started,
        }
    return {"packing": out}


def lower_bound(lengths: list[int]) -> int:
    """Rows that any packing of whole items needs: Martello and Toth's L2 (1990)."""
    number = np.bincount(lengths, minlength=LENGTH + 1)
    items, tokens = number.cumsum(), (number * np.arange(LENGTH + 1)).cumsum()
    best = -(-int(tokens[-1]) // LENGTH)
    half = LENGTH // 2
    for k in range(1, half + 1):
        long = items[LENGTH - k] - items[half]
        room = long * LENGTH - (tokens[LENGTH - k] - tokens[half])
        rest = tokens[half] - tokens[k - 1] - room
        best = max(best, int(items[LENGTH] - items[half] + max(0, -(-rest // LENGTH))))
    return best


def main() -> None:
    """Measure all of it."""
    from benchmarks import machine

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dialogues", type=int, default=200_000)
    parser.add_argument("--chats", type=Path)
    parser.add_argument("--rounds", type=int, default=8, help="among which the dialogues are shared out")
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "chats")
        folder.mkdir()
        given = map(sources.conversation, sources.read([asked.chats])) if asked.chats else dialogues(asked.dialogues)
        paths = [folder / f"{number}.jsonl" for number in range(asked.rounds)]
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("w")) for path in paths]
            for file, messages in zip(itertools.cycle(files), given, strict=False):
                file.write(json.dumps({"messages": messages}) + "\n")
        some = itertools.islice(sources.read(paths), 3000)
        tokenizer = trained(m["content"] for row in some for m in sources.conversation(row))
        result = {
            "versions": machine.versions(),
            "machine": machine.machine(),
            "tokenising": tokenising(tokenizer, paths),
            **from_cache(tokenizer, folder, Path(name, "cache")),
        }
    asked.output.write_text(json.dumps(result, indent=2) + "\n")
    show(result)


def show(value: Any, indent: int = 0) -> None:
    """A result as a table."""
    for name, part in value.items():
        if isinstance(part, dict):
            print(" " * indent + name)
            show(part, indent + 2)
        elif not isinstance(part, list):
            print(f"{' ' * indent}{name:<{50 - indent}}{part:>16,.4g}" if isinstance(part, float) else
                  f"{' ' * indent}{name:<{50 - indent}}{part!s:>16}")  # fmt: skip


if __name__ == "__main__":
    main()
