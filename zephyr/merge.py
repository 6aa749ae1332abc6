"""Make one whole model of an adapter and its base: `python -m zephyr.merge ADAPTER OUTPUT`.

The model that an adapter makes depends on the base below it. One that was trained in 4 bits makes, with the base as
stored, a slightly different model. By default the base is therefore held as in training; either way the difference is
measured and written down.
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from zephyr.errors import UserError, check_writable, reason

if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from torch import Tensor

    from zephyr.models.lineage import Lineage

_CHATS = (  # on which the difference is measured
    ("What does a lighthouse keeper do all day?", "Trims the lamp, winds the clockwork, and writes down every ship."),
    ("Write a line of Python that sums the squares below 10.", "sum(n * n for n in range(10))  # 285"),
    ("Wie heißt die Hauptstadt von Finnland?", "Die Hauptstadt von Finnland ist Helsinki."),
    ("A train leaves at 9:40 and arrives at 11:05. How long is the ride?", "One hour and twenty-five minutes."),
)


class Difference(NamedTuple):
    """How far a merged model's logits are from the adapter's on its base as trained."""

    most: float  # nats
    mean: float  # nats, absolute
    tokens: int  # over so many tokens, at each the whole vocabulary

    def __str__(self) -> str:
        return (
            f"at most {self.most:.2g} and on average {self.mean:.2g} nats, over the whole vocabulary at the "
            f"{self.tokens} tokens of {len(_CHATS)} short conversations"
        )


def main(arguments: list[str] | None = None) -> int:
    """Merge as the arguments say; the exit status is 2 after a mistake of the user."""
    args = _parser().parse_args(arguments)
    try:
        difference = merge(args.adapter, args.output, args.base, args.device)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.output}: a whole model. Its logits differ from the adapter's as trained by {difference}.")
    return 0


def merge(adapter: str, output: Path, kind: str | None = None, device: str = "auto") -> Difference:
    """Write the model folder `output`: weights, tokenizer, template and card.

    `kind` is what the adapter is added to: `dequantised`, the base as rounded to 4 bits in training, or `bf16`, the
    base as stored; None takes the one it was trained on. Weights are written in the dtype that training held the base
    in. Raises UserError when a part is missing, has changed, or `output` exists.
    """
    folder = _folder(adapter)
    if output.exists():
        raise UserError(f"{output} exists already. Name a folder that does not, or remove it.")
    check_writable(output, "OUTPUT")
    import torch
    from transformers.utils import logging

    from zephyr.export import export
    from zephyr.models.adapters import attach

    origin = _origin(folder)
    kind = kind or ("dequantised" if origin.quantization else "bf16")
    if kind == "dequantised" and not origin.quantization:
        raise UserError(
            f"--base dequantised: nothing beside {folder} says that its base was held in 4 bits in training. "
            "Leave out --base."
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    logging.disable_progress_bar()
    tokenizer = _tokenizer(origin)
    rows = [_ids(tokenizer, question, answer) for question, answer in _CHATS]

    trained = attach(_base(origin, device, bool(origin.quantization)), None, origin, dtype=torch.float32)
    before = _logits(trained, rows)
    model: Any
    if kind == "dequantised":
        model = _base(origin, "cpu", quantised=False)
        _merge_dequantised(trained, model)
    else:
        if origin.quantization:
            del trained  # first: there may be no room for both
            trained = attach(_base(origin, device, quantised=False), None, origin, dtype=torch.float32)
        model = _merge_in_place(trained)
    del trained
    difference = _difference(before, _logits(model.to(device), rows))
    export(model.to("cpu"), tokenizer, output, _card(origin, kind, difference))
    return difference


def _folder(adapter: str) -> str:
    """The adapter's folder, which may be given as that of a training run, or its hub id."""
    path = Path(adapter)
    for folder in (path, path / "model"):
        if (folder / "adapter_config.json").is_file():
            return str(folder)
    if any((folder / "config.json").is_file() for folder in (path, path / "model")):
        raise UserError(f"{path} holds a whole model: there is nothing to merge.")
    if path.exists():
        raise UserError(f"{path} holds no adapter: it has no adapter_config.json.")
    return adapter


def _origin(folder: str) -> "Lineage":
    """What the adapter was trained on, which must still be there as it was."""
    from zephyr.models.lineage import check_lineage, lineage
    from zephyr.models.policy import weights_fingerprint

    origin = lineage(folder, None)
    if origin is None:
        raise UserError(f"There is no adapter {folder}: it is neither a folder here nor an adapter's hub id.")
    base = Path(origin.base)
    if not base.is_dir() and (base.is_absolute() or len(base.parts) != 2):
        raise UserError(
            f"The base of this adapter, {base}, does not exist. If it has moved, write where it is now into "
            f"base_model_name_or_path of {origin.folder / 'adapter_config.json'}."
        )
    if origin.base_weights and base.is_dir():
        check_lineage(origin, origin.base, None, weights_fingerprint(origin.base, None))
    return origin


def _tokenizer(origin: "Lineage") -> Any:
    """The adapter's own tokenizer, with the template that it was trained on; the base's if it came without."""
    from transformers import AutoTokenizer

    from zephyr.data.render import load_tokenizer

    if (origin.folder / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(origin.folder)
    return load_tokenizer(origin.base, origin.base_revision)


def _base(origin: "Lineage", device: str, quantised: bool) -> Any:
    """The base as it was held in training, or as stored, in training's dtype."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from zephyr.models.four_bits import in_four_bits

    dtype = getattr(torch, origin.dtype) if origin.dtype else "auto"
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if quantised:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=origin.quantization,
            bnb_4bit_use_double_quant=origin.double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(origin.base, revision=origin.base_revision, **options)
    except Exception as error:  # whatever kind: the files are the user's, and the reason is in the message
        raise UserError(f"Cannot load the base of this adapter, {origin.base}: {reason(error)}") from error
    if not quantised and any(in_four_bits(module) for module in model.modules()):
        raise UserError(
            f"The base of this adapter, {origin.base}, is stored in 4 bits: no whole model can be made of it."
        )
    return model


def _merge_in_place(adapted: Any) -> Any:
    """Add an adapter to the weights below it, a layer at a time; the model without adapter layers."""
    import torch
    from peft.tuners.lora import LoraLayer

    from zephyr.models.adapters import START

    with torch.no_grad():
        for layer in adapted.modules():
            if isinstance(layer, LoraLayer):
                weight: Any = layer.get_base_layer().weight
                weight.copy_(_merged(layer, START, weight))
    return adapted.unload()


def _merge_dequantised(trained: Any, model: Any) -> None:
    """Write a 4-bit base's weights, as they are when computed with, and its adapter into the whole `model`."""
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    from zephyr.models.adapters import START
    from zephyr.models.four_bits import in_four_bits

    with torch.no_grad():
        for name, module in trained.get_base_model().named_modules():
            adapted = isinstance(module, LoraLayer)
            layer = module.get_base_layer() if adapted else module
            if in_four_bits(layer) and not name.endswith(".base_layer"):
                weight = dequantize_module_weight(layer)
                model.get_parameter(f"{name}.weight").copy_(_merged(module, START, weight) if adapted else weight)


def _merged(layer: Any, adapter: str, base: "Tensor") -> "Tensor":
    """The weight [out, in] of a layer with one of its adapters added to the base weight `base`, fp32."""
    import torch

    weight = base.float() + layer.get_delta_weight(adapter).to(base.device).float()
    if adapter in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[adapter].weight.to(base.device).float()
        weight *= (magnitude / torch.linalg.vector_norm(weight, dim=1))[:, None]
    return weight


def _ids(tokenizer: Any, question: str, answer: str) -> "Tensor":
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if tokenizer.chat_template is None:
        return tokenizer(f"{question}\n{answer}", return_tensors="pt")["input_ids"]
    return tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")["input_ids"]


def _logits(model: Any, rows: "list[Tensor]") -> "list[Tensor]":
    import torch

    model.eval()
    with torch.no_grad():
        return [model(input_ids=ids.to(model.device)).logits[0].float().cpu() for ids in rows]


def _difference(before: "list[Tensor]", after: "list[Tensor]") -> Difference:
    import torch

    apart = torch.cat(before).sub_(torch.cat(after)).abs_()
    return Difference(apart.max().item(), apart.mean().item(), len(apart))


def _card(origin: "Lineage", kind: str, difference: Difference) -> "ModelCard":
    """The adapter's card, which now speaks of a whole model."""
    from huggingface_hub import ModelCard

    name = Path(origin.base).name if Path(origin.base).is_dir() else origin.base
    if kind == "dequantised":
        bits = str(origin.quantization).upper()
        how = (
            f"rounded to 4 bits ({bits}) as in training and converted back. This is the model that trained, to rounding"
        )
    elif origin.quantization:
        how = "as stored. In training it was held in 4 bits, so this is not quite the model that trained"
    else:
        how = "as stored, on which it was trained"
    words = (
        f"An adapter was added to `{name}` {how}. The logits differ from those of the adapter on the base as trained "
        f"by {difference}."
    )
    section = f"\n## Merged weights\n\n{textwrap.fill(words, 110, break_on_hyphens=False)}\n"
    file = origin.folder / "README.md"
    card: Any = ModelCard(
        file.read_text() if file.exists() else f"---\ntags: [zephyr]\n---\n\n# {name}\n", ignore_metadata_errors=True
    )
    text, cut = re.subn(r"\n## Adapter\n.*?(?=\n## )", lambda _: section, card.text, count=1, flags=re.DOTALL)
    card.text = text.replace("transformers and peft alone", "transformers alone") if cut else card.text + section
    card.data.library_name, card.data.base_model_relation = "transformers", "finetune"
    return card


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m zephyr.merge", description="Make one model of an adapter and its base.")
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="folder of an adapter or of the run that trained it, or a hub id")
    add("output", type=Path, metavar="OUTPUT", help="folder to write, which must not exist")
    add(
        "--base",
        choices=("dequantised", "bf16"),
        help="what to add the adapter to: the base as rounded to 4 bits in training, or as stored; "
        "default: the one it was trained on",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: the fastest there is")
    return parser


if __name__ == "__main__":
    sys.exit(main())
