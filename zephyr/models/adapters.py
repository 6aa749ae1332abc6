"""Low-rank adapters: a policy that trains one over a frozen base.

Up to three adapters share the layers, told apart by PEFT's names:

    default     the one that trains
    start       the adapter that training starts from (the SFT stage's output), frozen
    reference   a frozen copy of default that follows it now and then (TR-DPO)

The policy is W x + start x + default x, and its reference the same with default off: exactly the model it started as,
whatever the ranks. Merging start into W would move the reference, as 4-bit weights would have to be rounded again.
On export start and default become one adapter.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from zephyr.errors import UserError, reason
from zephyr.models.four_bits import in_four_bits
from zephyr.models.lineage import Lineage, commit
from zephyr.models.low_rank import DEFAULT, accumulate
from zephyr.models.sharding import whole
from zephyr.settings import Lora

START, REFERENCE = "start", "reference"


def check_targets(model: Any, lora: Lora, start: Lineage | None = None) -> None:
    """Raise UserError if an adapter cannot go where the settings say; `start` is one that is there already.

    A model without weights will do.
    """
    names = _linear_names(model)
    if lora.target_modules != "all-linear":
        unknown = sorted(set(lora.target_modules) - names)
        if unknown:
            raise UserError(
                f"model.lora.target_modules: {', '.join(unknown)} name no linear layer; there are "
                f"{', '.join(sorted(names))}. (The head, which makes the logits, takes no adapter.)"
            )
    if start is not None and (lora.dora or _config(start).use_dora):
        what = "model.lora.dora=true" if lora.dora else f"The adapter in {start.folder} is a DoRA"
        raise UserError(
            f"{what}, which rescales the rows of the weights below it: two adapters, one of them a DoRA, do not add up "
            f"to one. Merge the first into its base (python -m zephyr.merge {start.folder} FOLDER) and start from that "
            "(model.path=FOLDER)."
        )


def attach(
    core: PreTrainedModel,
    lora: Lora | None,
    start: Lineage | None,
    *,
    dtype: torch.dtype,
    base_revision: str | None = None,
) -> Any:
    """Wrap a causal LM in PEFT, in place: below, the frozen adapter `start` if any; above, a new one if `lora`.

    The new one alone trains. Adapter weights are held in `dtype`, on the base's device, or on the CPU if the base is on
    the meta device. The torch seed alone decides the new one's values: neither the base's dtype nor its device does,
    nor numbers drawn before. DoRA over a base without weights waits for `init_magnitudes`. `base_revision` is the one
    that `core` was loaded from, for the record.
    """
    from peft import LoraConfig, get_peft_model

    configs: dict[str, Any] = {}
    if lora is not None:
        check_targets(core, lora, start)
        configs[DEFAULT] = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=sorted(_linear_names(core) if lora.target_modules == "all-linear" else lora.target_modules),
            use_dora=lora.dora,
            use_rslora=lora.rslora,
            task_type="CAUSAL_LM",
        )
    if start is not None:
        configs[START] = _config(start)
    module: Any
    for module in core.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its repacked weights let no gradient through on a CPU
    origin = _origin(core, start, base_revision)
    # Empty at first: PEFT would draw values from the global random state and round them to the base's dtype.
    empty: dict[str, Any] = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}
    (first, config), *others = configs.items()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # PEFT asks for it
        model: Any = get_peft_model(core, config, adapter_name=first, **empty)
    for name, config in others:
        model.add_adapter(name, config, **empty)
    for config in model.peft_config.values():
        config.base_model_name_or_path, config.revision = origin.base, origin.base_revision
    model.lineage = origin

    generator = torch.Generator().manual_seed(torch.initial_seed())
    stored = {} if start is None else _weights(start)
    for name, layer in _layers(model):
        accumulate(layer)
        device = layer.get_base_layer().weight.device
        device = torch.device("cpu") if device.type == "meta" else device
        for adapter in layer.lora_A:
            fresh = _fresh(layer, generator) if adapter == DEFAULT else _taken(stored, name, layer, start)
            for slot, values in fresh.items():
                module = getattr(layer, slot)[adapter]
                module.weight = nn.Parameter(values.to(device, dtype), requires_grad=adapter == DEFAULT)
        for magnitude in layer.lora_magnitude_vector.values():
            magnitude.get_weight_norm = MethodType(_row_norms, magnitude)
            magnitude.forward = MethodType(_rescaled, magnitude)
    if start is not None and stored:
        raise UserError(_misfit(start, f"its {min(stored)} has no place"))
    if start is not None and hasattr(core.get_output_embeddings(), "lora_A"):
        raise UserError(f"The adapter in {start.folder} changes the head, which makes the logits: not supported.")
    model.base_model.set_adapter([name for name in (START, DEFAULT) if name in configs])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name and f".{DEFAULT}." in name)
    if lora is not None and lora.dora and core.get_input_embeddings().weight.device.type != "meta":
        init_magnitudes(model)
    return model


@torch.no_grad()
def init_magnitudes(model: Any) -> None:
    """Set a new DoRA's magnitudes to the lengths of the base's rows. They are NaN until then."""
    from peft.utils.integrations import dequantize_module_weight

    for _, layer in _layers(model):
        for adapter, magnitude in layer.lora_magnitude_vector.items():
            if adapter != START:
                rows = dequantize_module_weight(layer.get_base_layer()).float()
                magnitude.weight.copy_(torch.linalg.vector_norm(rows, dim=1))


@contextmanager
def default_off(model: Any) -> Iterator[None]:
    """Inside, the policy is the model it started as: its base and `start`."""
    with _active(model, [START] if START in model.peft_config else []):
        yield


@contextmanager
def reference_on(model: Any) -> Iterator[None]:
    """Inside, `reference` stands in for `default`."""
    with _active(model, [name for name in (START, REFERENCE) if name in model.peft_config]):
        yield


def add_reference(model: Any) -> None:
    """Add `reference`, a frozen copy of `default`; nothing if there is one. Call it before the model is sharded."""
    if REFERENCE in model.peft_config:
        return
    model.peft_config[REFERENCE] = deepcopy(model.peft_config[DEFAULT])
    for _, layer in _layers(model):
        if any(isinstance(parameter, DTensor) for parameter in layer.lora_A.parameters()):
            raise RuntimeError("the reference adapter must be there before the model is sharded")
        for slot in {*layer.adapter_layer_names, *layer.other_param_names, "lora_variant"}:
            per_adapter = getattr(layer, slot)
            if DEFAULT in per_adapter:
                per_adapter[REFERENCE] = deepcopy(per_adapter[DEFAULT])
        layer.lora_dropout[REFERENCE] = nn.Identity()
    for _, parameter in reference_parameters(model):
        parameter.requires_grad_(False)


@torch.no_grad()
def sync(model: Any, share: float) -> None:
    """Move `reference` towards `default`: share x default + (1 - share) x reference, number by number."""
    parameters = dict(model.named_parameters())
    for name, parameter in reference_parameters(model):
        parameter.lerp_(parameters[name.replace(f".{REFERENCE}.", f".{DEFAULT}.")], share)


def reference_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of everything in `reference`."""
    return ((name, p) for name, p in model.named_parameters() if f".{REFERENCE}." in name and ".lora_" in name)


class Count(NamedTuple):
    """The size of a model."""

    quantised: int  # linear layers in 4 bits
    trainable: int  # parameters
    total: int  # parameters, a 4-bit weight counted as one


def count(model: nn.Module) -> Count:
    """Layers in 4 bits and parameters, over all processes if the model is sharded."""
    packed: list[Any] = [module for module in model.modules() if in_four_bits(module)]
    inside = {id(module.weight) for module in packed}
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    total = sum(p.numel() for p in others) + sum(m.in_features * m.out_features for m in packed)
    return Count(len(packed), sum(p.numel() for p in others if p.requires_grad), total)


def counted(model: nn.Module) -> str:
    """The size of a model in one line."""
    quantised, trainable, total = count(model)
    bits = f"; {quantised} linear layers in 4 bits" if quantised else ""
    return f"{trainable:,} of {total:,} parameters train ({trainable / total:.2%}){bits}"


def check_quantised(model: Any) -> None:
    """Raise UserError unless every linear layer but the head is in 4 bits."""
    head = (model.get_base_model() if hasattr(model, "peft_config") else model).get_output_embeddings()
    linear = {
        name: in_four_bits(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name
    }
    left = [name for name, packed in linear.items() if not packed]
    if left or not linear:
        raise UserError(
            f"model.quantization is set, but {len(left)} of {len(linear)} linear layers were left in full"
            f"{f', first {left[0]}' if left else ''}: this kind of model cannot be quantised. "
            "Set model.quantization=null."
        )


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Every adapter weight under its name in the model, whole and on the CPU. Of a sharded model all processes ask."""
    return {name: whole(p.detach()).cpu() for name, p in model.named_parameters() if ".lora_" in name}


def combined(model: Any, state: dict[str, Tensor] | None = None) -> tuple[Any, dict[str, Tensor]]:
    """What trained as one adapter over the base alone: PEFT's config, and weights as PEFT stores them.

    start and default add up exactly: with A stacked on A, and B beside B, each B times its scaling, the product is the
    sum of the products, in fp32. Ranks add up too; a layer with fewer is filled with zeros. `state` is the model's
    state_dict, or `adapter_state` of it.
    """
    from peft import LoraConfig, get_peft_model_state_dict

    state = adapter_state(model) if state is None else state
    trained = deepcopy(model.peft_config[DEFAULT])
    trained.inference_mode = True
    base = trained.base_model_name_or_path
    if base and Path(base).is_dir():
        trained.base_model_name_or_path = str(Path(base).resolve())
    if START not in model.peft_config:
        weights = get_peft_model_state_dict(model, state, DEFAULT, save_embedding_layers=False)
        return trained, {name: weight.contiguous() for name, weight in weights.items()}

    layers = _layers(model)
    rank = max(sum(layer.r[name] for name in layer.lora_A if name != REFERENCE) for _, layer in layers)
    weights = {}
    for name, layer in layers:
        both = [adapter for adapter in (START, DEFAULT) if adapter in layer.lora_A]
        down = torch.cat([state[f"{name}.lora_A.{adapter}.weight"].float() for adapter in both])
        up = torch.cat([state[f"{name}.lora_B.{a}.weight"].float() * layer.scaling[a] for a in both], 1)
        spare = rank - len(down)
        weights[f"{name}.lora_A.weight"] = F.pad(down, (0, 0, 0, spare))
        weights[f"{name}.lora_B.weight"] = F.pad(up, (0, spare))
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=trained.lora_dropout,
        target_modules=_shortest_names(model, [name for name, _ in layers]),
        task_type="CAUSAL_LM",
        base_model_name_or_path=trained.base_model_name_or_path,
        revision=trained.revision,
        inference_mode=True,
    )
    return config, weights


def _config(start: Lineage) -> Any:
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(start.folder))
    config.lora_dropout, config.inference_mode, config.init_lora_weights = 0.0, True, True
    return config


def _weights(start: Lineage) -> dict[str, Tensor]:
    try:
        return load_file(start.folder / "adapter_model.safetensors")
    except Exception as error:
        raise UserError(
            f"Cannot read the adapter's weights, {start.folder / 'adapter_model.safetensors'}: {reason(error)} "
            "Get or train it again."
        ) from error


def _origin(core: Any, start: Lineage | None, revision: str | None) -> Lineage:
    """What the new adapter is trained on."""
    base = core.config.name_or_path if start is None else start.base
    revision = revision and commit(base, revision) if start is None else start.base_revision
    bits = getattr(core.config, "quantization_config", None)
    return Lineage(
        base,
        revision,
        base_weights=None if start is None else start.base_weights,
        quantization=getattr(bits, "bnb_4bit_quant_type", None),
        double_quantization=getattr(bits, "bnb_4bit_use_double_quant", False),
        dtype=str(core.get_input_embeddings().weight.dtype).removeprefix("torch."),
    )


def _fresh(layer: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """A as PEFT draws it, B zero, so that training starts from the model below; a DoRA's magnitudes come later."""
    rank = layer.r[DEFAULT]
    down = torch.empty(rank, layer.in_features)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    fresh = {"lora_A": down, "lora_B": torch.zeros(layer.out_features, rank)}
    if DEFAULT in layer.lora_magnitude_vector:
        fresh["lora_magnitude_vector"] = torch.full((layer.out_features,), math.nan)
    return fresh


def _taken(stored: dict[str, Tensor], name: str, layer: Any, start: Lineage | None) -> dict[str, Tensor]:
    """A layer's weights out of an adapter's file, which loses them."""
    assert start is not None
    rank = layer.r[START]
    shapes: dict[str, tuple[int, ...]] = {"lora_A": (rank, layer.in_features), "lora_B": (layer.out_features, rank)}
    if START in layer.lora_magnitude_vector:
        shapes["lora_magnitude_vector"] = (layer.out_features,)
    taken = {}
    for slot, shape in shapes.items():
        key = f"{name}.{slot}" + ("" if slot == "lora_magnitude_vector" else ".weight")
        if key not in stored or stored[key].shape != shape:
            raise UserError(_misfit(start, f"it has no {key} of shape {list(shape)}"))
        taken[slot] = stored.pop(key)
    return taken


def _misfit(start: Lineage, why: str) -> str:
    return (
        f"The weights of the adapter in {start.folder} do not fit {start.base} and its adapter_config.json: {why}. "
        "Get or train it again."
    )


def _row_norms(magnitude: Any, weight: Tensor, lora_weight: Tensor, scaling: float, **_: Any) -> Tensor:
    """Lengths of the rows of base + adapter, in place of PEFT's, which rounds them to the dtype of the layer's input.

    A new DoRA would differ from its base by that.
    """
    rows = torch.linalg.vector_norm(weight.float() + scaling * lora_weight.float(), dim=1)
    return rows.to(magnitude.weight.dtype)


def _rescaled(magnitude: Any, x: Tensor, **others: Any) -> Tensor:
    """PEFT's DoRA, in the dtype of the layer's input: fp32 magnitudes would turn what follows to fp32 as well."""
    return type(magnitude).forward(magnitude, x, **others).to(x.dtype)


@contextmanager
def _active(model: Any, names: list[str]) -> Iterator[None]:
    """PEFT's own switches would also change gradient flags, which neither the optimizer nor a sharded model expects."""
    layers = [layer for _, layer in _layers(model)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = names, not names
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _linear_names(core: Any) -> set[str]:
    """Last parts of the names of all linear layers but the head, whose adapter no log-probability would see."""
    head = core.get_output_embeddings()
    modules = core.named_modules()
    return {name.rsplit(".", 1)[-1] for name, module in modules if isinstance(module, nn.Linear) and module is not head}


def _shortest_names(model: Any, adapted: list[str]) -> list[str]:
    """Names that mean these layers to PEFT: last parts, such as q_proj, unless some layer so named is not adapted."""
    prefix = "base_model.model."
    lasts = {name.rsplit(".", 1)[-1] for name in adapted}
    alike = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in lasts]
    return sorted(lasts if set(alike) == set(adapted) else {name.removeprefix(prefix) for name in adapted})
