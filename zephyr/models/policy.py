"""The policy: a causal language model from a folder or the hub, in full, as an adapter, or on 4-bit base weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from zephyr.errors import UserError
from zephyr.models.attention import SEGMENTS
from zephyr.settings import Lora


def load_policy(
    path: str,
    revision: str | None,
    dtype: torch.dtype,
    lora: Lora | None,
    quantization: str | None,
    activation_checkpointing: bool,
) -> PreTrainedModel:
    """Load a model that trains on packed rows.

    `dtype` is that of the trained weights; the frozen base of an adapter is held in bf16 when quantised. Raises
    UserError when the model cannot be loaded or does something to its logits that log-probabilities would miss.
    """
    config = _config(path, revision)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": SEGMENTS}
    if quantization:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_compute_dtype=torch.bfloat16
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(path, revision=revision, config=config, **options)
    except (OSError, ValueError) as error:
        raise _unloadable(path, error) from error
    model.config.use_cache = False
    if lora is not None:
        model = _with_adapter(model, lora)
    if activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def check_policy(path: str, revision: str | None) -> None:
    """Read the model's configuration, no weights. Raises UserError as `load_policy` would, in seconds."""
    _config(path, revision)


def _config(path: str, revision: str | None) -> Any:
    if Path(path, "adapter_config.json").exists() and not Path(path, "config.json").exists():
        raise UserError(
            f"model.path={path} is an adapter. Merge it into its base first (peft's merge_and_unload), "
            "and name the merged folder."
        )
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists():
        hint = f" Did you mean {folder / 'model'}?" if (folder / "model" / "config.json").exists() else ""
        raise UserError(f"model.path: the folder {path} holds no model (config.json).{hint}")
    if not folder.exists() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise UserError(f"model.path: the folder {path} does not exist (looked in {Path.cwd()}).")
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise _unloadable(path, error) from error
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1.0):
            raise UserError(f"{path}: models that change their logits ({name}) are not supported.")
    return config


def _with_adapter(model: PreTrainedModel, lora: Lora) -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model

    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "in_features")}
    unknown = sorted(set(lora.target_modules) - linear)
    if unknown:
        raise UserError(
            f"model.lora.target_modules: {', '.join(unknown)} name no linear layer; there are "
            f"{', '.join(sorted(linear))}."
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its repacked weights let no gradient through on a CPU
    return get_peft_model(model, config)


def _unloadable(path: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"Cannot load the model {path!r} (model.path): {reason} Give a folder with config.json, or a hub id "
        "(with HF_TOKEN set where it is gated)."
    )
