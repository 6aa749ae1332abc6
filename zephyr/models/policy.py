"""The policy: a causal language model from a folder or the hub, in full, as an adapter, or on 4-bit base weights."""

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from zephyr.errors import UserError, reason
from zephyr.models.adapters import add_reference, attach, check_quantised, check_targets, init_magnitudes
from zephyr.models.attention import SEGMENTS
from zephyr.models.decoder import Checkpointing, rewrite
from zephyr.models.float8 import check_float8, use_float8
from zephyr.models.lineage import lineage
from zephyr.models.products import Linear
from zephyr.models.sharding import load_rows, shard, weight_files
from zephyr.settings import Lora, Model

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where a model's weights live and in what precision they compute: what several modules must agree on."""

    device: torch.device  # of this process
    precision: Literal["32-true", "bf16-mixed", "bf16-true"]
    mesh: DeviceMesh | None = None  # shard over it
    cpu_offload: bool = False  # of a sharded model
    compile: bool = False

    @property
    def compute(self) -> torch.dtype:
        """The dtype of matrix products, and of frozen weights: an update cannot be lost in them."""
        return torch.float32 if self.precision == "32-true" else torch.bfloat16

    @property
    def trained(self) -> torch.dtype:
        """The dtype of trained weights: fp32 unless asked otherwise, as bf16 rounds small updates to nothing."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32

    @property
    def autocast(self) -> bool:
        """Whether products must be cast as they come; sharded layers are cast as they are gathered."""
        return self.precision == "bf16-mixed" and self.mesh is None


def load_policy(
    path: str,
    revision: str | None,
    model: Model,
    placement: Placement,
    frozen: bool = False,
    follower: bool = False,
) -> PreTrainedModel:
    """Load a model that trains on packed rows: all its weights, or an adapter over frozen ones.

    `path` may be an adapter's folder: it is then a frozen part of the policy, below the new one. A `frozen` model is
    the policy as it starts, to compare with; a `follower` is a second new adapter, frozen, that can follow the first.
    Raises UserError when the model cannot be loaded or does something to its
    logits that log-probabilities would miss.
    """
    start = lineage(path, revision)
    if start is not None and model.lora is None and not frozen:
        raise UserError(
            f"{path} is an adapter, and all weights are to be trained. Train an adapter again (trainer=lora or qlora), "
            f"or merge it into its base first: python -m zephyr.merge {path} FOLDER"
        )
    base, base_revision = (path, revision) if start is None else (start.base, start.base_revision)
    trains_all = model.lora is None and not frozen
    # Autocast rounds products alone, so that a frozen copy must keep the weights from which the policy starts.
    exact = trains_all or (placement.autocast and model.lora is None)
    dtype = placement.trained if exact else placement.compute
    core = _load(base, base_revision, model, placement, dtype)
    core.config.use_cache = False
    policy = core
    lora = None if frozen else model.lora
    if lora is not None or start is not None:
        policy = attach(core, lora, start, dtype=placement.trained, base_revision=base_revision)
    if follower:
        add_reference(policy)
    if model.quantization:
        check_quantised(policy)
    if model.float8:
        check_float8(placement.device)
        use_float8(core)
    prepare(core, "none" if frozen else model.activation_checkpointing, placement.compile)
    if frozen:
        policy.requires_grad_(False)
    if placement.mesh is None:
        policy.to(placement.device)
    else:
        # on the CPU, offloaded weights stay where they are read
        home = torch.device("cpu") if placement.cpu_offload else placement.device
        mixed = placement.compute if placement.precision == "bf16-mixed" else None
        shard(core, placement.mesh, mixed, placement.cpu_offload)
        if not model.quantization:
            load_rows(core, weight_files(base, base_revision), home)
            if lora is not None and lora.dora:
                init_magnitudes(policy)
    return policy.eval() if frozen else policy.train()  # eval mode switches checkpointing off


def _load(path: str, revision: str | None, model: Model, placement: Placement, dtype: torch.dtype) -> Any:
    """The transformers model; without weights if each process will read its own rows."""
    config = read_config(path, revision)
    if placement.mesh is not None and not model.quantization:
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=SEGMENTS)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": SEGMENTS}
    if model.quantization:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=model.quantization,
            bnb_4bit_use_double_quant=model.double_quantization,
            bnb_4bit_compute_dtype=placement.compute,
        )
        options["device_map"] = {"": placement.device}
    logging.getLogger("transformers.modeling_utils").addFilter(_no_load_report)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # whatever kind: the files are the user's, and the reason is in the message
        raise _unloadable(path, error) from error
    core, report = loaded
    absent = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if absent:
        raise UserError(
            f"The weights of {path} are not those of its config.json: {len(absent)} are missing or of another shape, "
            f"first {absent[0]}. Get the whole model again."
        )
    for module in core.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its repacked weights let no gradient through on a CPU
    return core


def prepare(core: Any, checkpointing: Checkpointing, compiled: bool = False) -> None:
    """Set how the layers compute: what is computed again in the backward pass, and whether they are compiled."""
    for module in core.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    if rewrite(core, checkpointing, compiled):
        return
    kind = type(core).__name__
    if checkpointing == "selective":
        _log.info("Layers of %s can be checkpointed in full only; that is done.", kind)
    if checkpointing != "none":
        core.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compiled:
        _log.info("Layers of %s are compiled but for their attention.", kind)
        for layer in core.get_decoder().layers:
            for name, part in layer.named_children():
                if "norm" in name or "att" not in name:
                    part.compile(dynamic=True)


def check_policy(path: str, revision: str | None, lora: Lora | None = None) -> Any:
    """The model's configuration. Raises UserError as `load_policy` would, but in seconds: no weight is read."""
    start = lineage(path, revision)
    if start is not None:
        path, revision = start.base, start.base_revision
    config = read_config(path, revision)
    try:
        model = skeleton(config)
        if Path(path).is_dir():
            _open_weights(Path(path))
    except Exception as error:
        raise _unloadable(path, error) from error
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"{path}: models whose output layer has a bias are not supported.")
    if lora is not None:
        check_targets(model, lora, start)
    return config


def skeleton(config: Any) -> PreTrainedModel:
    """The model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=SEGMENTS)


def weights_fingerprint(path: str, revision: str | None) -> str:
    """A hash of every byte of a model's weights, an adapter's and its base's: what tells it from any other."""
    start = lineage(path, revision)
    folder = Path(path) if start is None else start.folder
    files = set(folder.glob("*.safetensors") if folder.is_dir() else weight_files(path, revision).values())
    parts = [] if start is None else [weights_fingerprint(start.base, start.base_revision)]
    with ThreadPoolExecutor() as threads:
        parts += threads.map(_digest, sorted(files))
    return hashlib.blake2b("".join(parts).encode(), digest_size=16).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return file.name + hashlib.file_digest(stream, hashlib.blake2b).hexdigest()


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


def read_config(path: str, revision: str | None) -> Any:
    """The configuration of a folder or a hub model. Raises UserError where there is none that can be trained."""
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


def _no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()  # we refuse a model of which a weight is missing


def _unloadable(path: str, error: Exception) -> UserError:
    return UserError(
        f"Cannot load the model {path!r} (model.path, or else model.base): {reason(error)} "
        "Give a whole model's folder or hub id (with HF_TOKEN set where it is gated)."
    )
