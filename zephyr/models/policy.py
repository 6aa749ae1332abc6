"""The policy: a causal language model from a folder or the hub, in full, as an adapter, or on 4-bit base weights."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from zephyr.errors import UserError, reason
from zephyr.models.attention import SEGMENTS
from zephyr.settings import Lora

_END = 1 << 20  # bytes at each end of a file that its fingerprint reads


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
    logging.getLogger("transformers.modeling_utils").addFilter(_no_load_report)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # whatever kind: the files are the user's, and the reason is in the message
        raise _unloadable(path, error) from error
    model, report = loaded
    absent = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if absent:
        raise UserError(
            f"The weights of {path} are not those of its config.json: {len(absent)} are missing or of another shape, "
            f"first {absent[0]}. Get the whole model again."
        )
    model.config.use_cache = False
    if lora is not None:
        model = _with_adapter(model, lora, revision)
    if activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def check_policy(path: str, revision: str | None, lora: Lora | None = None) -> Any:
    """The model's configuration. Raises UserError as `load_policy` would, but in seconds: no weight is read."""
    config = _config(path, revision)
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, attn_implementation=SEGMENTS)
        if Path(path).is_dir():
            _open_weights(Path(path))
    except Exception as error:
        raise _unloadable(path, error) from error
    if lora is not None:
        _check_targets(skeleton, lora)
    return config


def weights_fingerprint(path: str) -> str:
    """What tells a local model's weights from others: the size of each file and a hash of both its ends.

    A hub model is told by its revision, so it has none.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(path).glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + stream.read(_END))
            stream.seek(max(0, file.stat().st_size - _END))
            digest.update(stream.read())
    return digest.hexdigest() if Path(path).is_dir() else ""


def _open_weights(folder: Path) -> None:
    """Open every safetensors file, which reads its header alone: it tells a missing file and one that was cut."""
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
    files = {folder / shard for shard in shards} or {*folder.glob("*.safetensors")}
    if not files and not any(folder.glob("*.bin")):
        raise FileNotFoundError("it has no weights (model.safetensors).")
    for file in sorted(files):
        try:
            with safe_open(file, "pt"):
                pass
        except Exception as error:
            raise ValueError(f"{file.name} is missing or damaged: {reason(error)}") from error


def _config(path: str, revision: str | None) -> Any:
    if Path(path, "adapter_config.json").exists() and not Path(path, "config.json").exists():
        raise UserError(
            f"model.path={path} is an adapter. Merge it into its base first (peft's merge_and_unload), "
            "and name the merged folder."
        )
    folder = Path(path)
    if folder.exists() and not (folder / "config.json").exists():
        hint = f" Did you mean {folder / 'model'}?" if (folder / "model" / "config.json").exists() else ""
        raise UserError(f"model.path: {path} holds no model (config.json).{hint}")
    if not folder.exists() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise UserError(
            f"model.path: the folder {path} does not exist (looked in {Path.cwd()}). A hub id is OWNER/NAME."
        )
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except Exception as error:
        raise _unloadable(path, error) from error
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1.0):
            raise UserError(f"{path}: models that change their logits ({name}) are not supported.")
    return config


def _with_adapter(model: PreTrainedModel, lora: Lora, revision: str | None) -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model

    _check_targets(model, lora)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its repacked weights let no gradient through on a CPU
    adapted: Any = get_peft_model(model, config, revision=revision)
    return adapted


def _check_targets(model: PreTrainedModel, lora: Lora) -> None:
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "in_features")}
    unknown = sorted(set(lora.target_modules) - linear)
    if unknown:
        raise UserError(
            f"model.lora.target_modules: {', '.join(unknown)} name no linear layer; there are "
            f"{', '.join(sorted(linear))}."
        )


def _no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()  # we refuse a model of which a weight is missing


def _unloadable(path: str, error: Exception) -> UserError:
    return UserError(
        f"Cannot load the model {path!r} (model.path, or else model.base): {reason(error)} "
        "Give a whole model's folder or hub id (with HF_TOKEN set where it is gated)."
    )
