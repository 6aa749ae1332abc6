"""What a finished stage leaves behind: a folder that plain transformers (or PEFT) loads, with a model card.

The folder appears complete or not at all: it is written beside its place and renamed into it.
"""

import copy
import math
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from zephyr import __version__
from zephyr.models.adapters import combined
from zephyr.models.lineage import Lineage, save_record
from zephyr.models.policy import weights_fingerprint

Value = str | int | float | bool | None


class Card(NamedTuple):
    """What the model card tells; a hub id given for the model or the data also becomes a link."""

    name: str  # of the model, such as zephyr-7b-beta-sft
    stage: str  # sft or dpo
    base_model: str  # hub id or folder that training started from
    base_revision: str | None
    datasets: list[str]  # hub ids or file names
    fingerprints: Mapping[str, str]  # split -> hash of the data it was read from
    training: Mapping[str, Value]  # the main numbers: learning rate, batch, steps, ...
    metrics: Mapping[str, float]  # the last train/... and eval/... values
    license: str | None = None  # SPDX identifier, if the weights have a known one


def export(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: Card | ModelCard,
    dtype: torch.dtype | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write the policy, its tokenizer and its card to `folder`, in place of what was there.

    A PEFT policy is written as one adapter over its base. Weights are stored in `dtype`, or as they are. A sharded
    policy needs its gathered `state_dict`, and one process that calls this. On any failure the old folder stays.
    """
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    for rest in (partial, old):
        shutil.rmtree(rest, ignore_errors=True)
    try:
        partial.mkdir()
        adapter = hasattr(policy, "peft_config")
        origin: Lineage | None = getattr(policy, "lineage", None)
        if adapter:
            _save_adapter(policy, origin, partial, dtype, state_dict)
        else:
            _save_weights(policy, tokenizer, partial, dtype, state_dict)
        _save_tokenizer(tokenizer, partial)
        if isinstance(card, Card):
            card = model_card(card, adapter, origin.quantization if origin else None)
        card.save(partial / "README.md")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def model_card(card: Card, adapter: bool = False, quantization: str | None = None) -> ModelCard:
    """The card as huggingface_hub has it: metadata for search, then a text for readers.

    `quantization` is that of an adapter's base.
    """
    hub_datasets = [name for name in card.datasets if _is_hub_id(name)]
    split: dict[str, Any] = {
        "task_type": "text-generation",
        "task_name": "Text generation",
        "dataset_split": "validation",
    }
    results = [
        EvalResult(
            **split,
            dataset_type=hub_datasets[0] if hub_datasets else "private",
            dataset_name=", ".join(card.datasets),
            metric_type=name.removeprefix("eval/"),
            metric_value=value,
        )
        for name, value in card.metrics.items()
        if name.startswith("eval/") and math.isfinite(value) and card.datasets
    ]
    data = ModelCardData(
        base_model=card.base_model if _is_hub_id(card.base_model) else None,
        base_model_relation="adapter" if adapter else "finetune",
        datasets=hub_datasets or None,
        eval_results=results or None,
        library_name="peft" if adapter else "transformers",
        license=card.license,
        model_name=card.name,
        pipeline_tag="text-generation",
        tags=["zephyr", card.stage, "alignment"],
    )
    built: ModelCard = ModelCard.from_template(
        data,
        template_str=_BODY,
        card=card,
        adapter=adapter,
        quantization=quantization,
        training=_table("Setting", "Value", card.training),
        metrics=_table("Metric", "Value", card.metrics),
        fingerprints=_table("Split", "Fingerprint", card.fingerprints),
        versions=_table("Package", "Version", _versions(adapter)),
    )
    return built


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the tokenizer, and see that plain transformers reads the same one back: not every setting is saved."""
    tokenizer.save_pretrained(folder)
    read: Any = AutoTokenizer.from_pretrained(folder)
    text = f"<|user|>\nHello!  Two\n\nlines?{tokenizer.eos_token}\n<|assistant|>\n Bonjour!{tokenizer.eos_token}\n"
    if read(text)["input_ids"] != tokenizer(text)["input_ids"] or read.chat_template != tokenizer.chat_template:
        raise RuntimeError(f"the tokenizer saved in {folder} is not the one trained with: it reads {text!r} otherwise")


def _save_adapter(
    policy: Any,
    origin: Lineage | None,
    folder: Path,
    dtype: torch.dtype | None,
    state_dict: dict[str, Tensor] | None,
) -> None:
    """Save a PEFT policy's adapter, and what it was trained on."""
    config, weights = combined(policy, state_dict)
    weights = {name: weight.to(dtype) if dtype else weight for name, weight in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    if origin is not None:
        if origin.base_weights is None and origin.base and Path(origin.base).is_dir():
            origin = origin._replace(base_weights=weights_fingerprint(origin.base, origin.base_revision))
        save_record(origin, folder)


def _save_weights(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype | None,
    state_dict: dict[str, Tensor] | None,
) -> None:
    if dtype is not None:
        state_dict = policy.state_dict() if state_dict is None else state_dict
        state_dict = {k: v.to("cpu", dtype) if v.is_floating_point() else v for k, v in state_dict.items()}
    # transformers writes the config as training bends it, and refuses some base models' generation settings:
    # both are set aside while it writes the weights, then written as they should be.
    kept = copy.deepcopy(policy.config), policy.generation_config
    if state_dict is not None:  # copies no longer share memory, by which transformers knows tied weights
        tied = policy.all_tied_weights_keys
        state_dict = {name: weight for name, weight in state_dict.items() if name not in tied}
    try:
        policy.generation_config = GenerationConfig()
        policy.save_pretrained(folder, state_dict=state_dict)
        config = copy.deepcopy(policy.config)
    finally:
        policy.config.dtype, policy.config.architectures = kept[0].dtype, kept[0].architectures
        policy.generation_config = kept[1]
    config.use_cache = True
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if dtype is not None:
        config.dtype = dtype
    config.save_pretrained(folder)
    window = getattr(config.get_text_config(), "max_position_embeddings", 2048)
    GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        max_new_tokens=min(1024, window // 2),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)


def _is_hub_id(name: str) -> bool:
    """Whether a name can be a repository's, as opposed to a file or a folder."""
    path = Path(name)
    return len(path.parts) == 2 and not path.is_absolute() and path.parts[0] != ".." and not path.exists()


def _versions(adapter: bool) -> dict[str, str]:
    found = {"zephyr": __version__}
    for package in ("torch", "lightning", "transformers", *(["peft"] if adapter else [])):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _table(left: str, right: str, rows: Mapping[str, Value]) -> str:
    """A Markdown table, or nothing for no rows; the bars and line breaks of a value cannot break it."""
    if not rows:
        return ""

    def cell(value: Value) -> str:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        return " ".join(text.split()).replace("|", "\\|")

    lines = [f"| {left} | {right} |", "|---|---|", *(f"| {cell(k)} | {cell(v)} |" for k, v in rows.items())]
    return "\n".join(lines)


_BODY = """---
{{ card_data }}
---

# {{ card.name }}

{% if card.stage == "dpo" -%}
A chat model aligned with distilled direct preference optimisation (dDPO): from pairs of answers, ranked by a
stronger model, it learned to prefer the better one, held close to where it started.
{%- else -%}
A chat model made by distilled supervised fine-tuning (dSFT): a language model that learned to converse from
dialogues written by a stronger one.
{%- endif %} It was trained with Zephyr
([Tunstall et al., 2023](https://arxiv.org/abs/2310.16944)), starting from
`{{ card.base_model }}`{% if card.base_revision %} at revision `{{ card.base_revision }}`{% endif %}.
{%- if adapter %}

## Adapter

This folder holds the adapter alone; the weights of the base model are loaded beside it.{% if quantization %} In
training that base was held in 4 bits ({{ quantization.upper() }}), and differs from its stored weights by rounding: so
does the model that they make with this adapter.{% endif %} To have one folder with all weights:

```
python -m zephyr.merge PATH FOLDER
```
{%- endif %}

## Use

```
python -m zephyr.chat PATH
```

or, with transformers{% if adapter %} and peft{% endif %} alone, where PATH is this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
chat = [{"role": "user", "content": "Why is the sky blue?"}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs{% if adapter %}, max_new_tokens=512{% endif %})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

## Chat format

The template is in `chat_template.jinja`: a role marker (`<|system|>`, `<|user|>` or `<|assistant|>`) on a
line of its own, the text, and the end-of-sequence token. There is no BOS token, neither in training nor
here: do not add one. Role markers and special tokens inside a message are broken up by the template, so a
text cannot pose as a turn.

## Training

{{ training }}

## Data

{% for name in card.datasets %}- `{{ name }}`
{% endfor %}
{{ fingerprints }}

## Results

{{ metrics }}

`train/...` is the last step of training, `eval/...` the last validation. Rewards and log-probabilities are
sums over an answer, in nats.

## Versions

{{ versions }}

## Limits

The model answers in the style of its data. It may state falsehoods with confidence, and it has had no safety
training beyond what the data holds.
"""
