"""The memory of a training step, found by running the step on tensors that have shapes but no data.

Nothing is estimated by formula: the policy, the reference, FSDP's gathering, checkpointing and the loss are those of
the run, under torch's FakeTensorMode and, for sharded models, a process group that only pretends. Every storage is
booked when it appears and when it goes. What kernels allocate for themselves is not seen, nor is the allocator's loss
to fragments.
"""

import copy
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from zephyr.data.batch import Batch
from zephyr.dpo import DPO
from zephyr.models.adapters import add_reference, attach
from zephyr.models.attention import undivided
from zephyr.models.four_bits import in_four_bits
from zephyr.models.policy import Placement, prepare, skeleton
from zephyr.models.reference import AdapterOff, Copy, Precomputed, Reference
from zephyr.models.sharding import shard
from zephyr.objectives import REFERENCE_FREE
from zephyr.settings import Model, Settings
from zephyr.sft import SFT
from zephyr.training.task import Task

_FEW = 4  # layers that tell how a step grows with their number: the first two, the last two
_BLOCK = 64  # 4-bit weights that share a scale


class Peak(NamedTuple):
    """Bytes on a device at the moment of a step when it holds most, without the optimizer's."""

    weights: float
    gradients: float
    reference: float
    activations: float
    logits: float  # of the chunk of scored tokens at hand
    casts: float  # by autocast: weights in the dtype of the products; kept for the backward pass unless recomputed
    gathered: float  # by FSDP: layers in full, and what their gradients are summed in

    @property
    def total(self) -> float:
        return sum(self)


_NOTHING = Peak(*[-1.0] * 7)


class Run(NamedTuple):
    """What is simulated."""

    settings: Settings
    config: Any  # of the transformers model
    mesh: tuple[int, ...] | None  # of FSDP: [processes], or [replicas, processes of each]
    reference: str | None  # copy, adapter or precomputed
    batch: Batch  # a micro-batch; only its shape counts
    micro_batches: int  # of a step; from the second on, gradients are there all the time


def peak(run: Run, whole: bool = False) -> Peak:
    """The peak of a step. Equal layers are simulated a few at a time, and the rest follows, exactly; or `whole`."""
    layers = run.config.num_hidden_layers
    if whole or layers <= _FEW + 1 or not _equal_layers(run.config):
        return max(_moments(run, layers).values(), key=lambda moment: moment.total)
    few, more = _moments(run, _FEW), _moments(run, _FEW + 1)
    # Every moment grows linearly with the layers, each by its own slope; those of layers in between lie in between.
    grown = [
        Peak(*(a + (b - a) * (layers - _FEW) for a, b in zip(few[moment], more[moment], strict=True))) for moment in few
    ]
    return max(grown, key=lambda moment: moment.total)


def _equal_layers(config: Any) -> bool:
    layers = skeleton(config).get_decoder().layers
    shapes = {tuple((name, p.shape) for name, p in layer.named_parameters()) for layer in layers}
    return len(shapes) == 1 and len(set(getattr(config, "layer_types", None) or [])) <= 1


def _moments(run: Run, layers: int) -> dict[Hashable, Peak]:
    """What a step of a model of so many layers holds at most, at each of its moments."""
    config = copy.deepcopy(run.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with warnings.catch_warnings(), undivided(), _pretended(run.mesh) as mesh:
        warnings.simplefilter("ignore")
        placement = Placement(torch.device("cpu"), run.settings.trainer.precision, mesh)
        ledger, fake = _Ledger(config.vocab_size), FakeTensorMode()
        follows = run.settings.reference is not None and bool(run.settings.reference.sync_every_n_steps)
        policy = _bare(run.settings.model, config, placement, follower=follows and run.reference == "adapter")
        frozen = _bare(run.settings.model, config, placement, frozen=True) if run.reference == "copy" else None
        with fake, ledger, ledger.gathering(mesh is not None, run.settings.model.quantization is not None):
            _furnish(policy, run.settings.model, placement, ledger, "weights")
            reference: Reference | None = Precomputed() if run.reference == "precomputed" else None
            if frozen is not None:
                _furnish(frozen, None, placement, ledger, "reference")
                reference = Copy(frozen)
            elif run.reference == "adapter":
                reference = AdapterOff(follows)
            batch = tree_map_only(Tensor, fake.from_tensor, run.batch)
            _step(_task(run.settings, policy, reference), batch, run.micro_batches, placement, ledger)
    return ledger.moments


@contextmanager
def _pretended(shape: tuple[int, ...] | None) -> Iterator[DeviceMesh | None]:
    """A mesh of processes that are not there."""
    if shape is None:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=math.prod(shape))
    try:
        yield init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    finally:
        dist.destroy_process_group()


def _bare(model: Model, config: Any, placement: Placement, frozen: bool = False, follower: bool = False) -> Any:
    """The model that `load_policy` would load, on the meta device; adapters alone have data, to no purpose."""
    core: Any = skeleton(config)
    core.config.use_cache = False
    exact = (model.lora is None and not frozen) or (placement.autocast and model.lora is None)
    core.to(placement.trained if exact else placement.compute)
    if model.quantization:
        _quantise(core, model, placement.compute)
    policy = core
    if model.lora is not None and not frozen:
        policy = attach(core, model.lora, None, dtype=placement.trained)
    if follower:
        add_reference(policy)
    return policy.requires_grad_(False) if frozen else policy


def _quantise(core: Any, model: Model, compute: torch.dtype) -> None:
    from bitsandbytes.nn import Linear4bit

    core.is_loaded_in_4bit = True  # PEFT asks
    for name, layer in [*core.named_modules()]:
        if isinstance(layer, nn.Linear) and layer is not core.get_output_embeddings():
            options = {"compress_statistics": model.double_quantization, "quant_type": model.quantization}
            bias = layer.bias is not None
            packed = Linear4bit(layer.in_features, layer.out_features, bias, compute, **options, device="meta")
            core.set_submodule(name, packed)


def _furnish(policy: Any, model: Model | None, placement: Placement, ledger: "_Ledger", label: str) -> None:
    """Give a bare model storages, and make of it what `load_policy` makes; None of a model that is frozen."""
    core = policy.get_base_model() if hasattr(policy, "peft_config") else policy
    with ledger.booking(label):
        _fill(policy, placement.compute)
        prepare(core, "none" if model is None else model.activation_checkpointing)
        if placement.mesh is not None:
            mixed = placement.compute if placement.precision == "bf16-mixed" else None
            shard(core, placement.mesh, mixed, cpu_offload=False)
    policy.train(model is not None)
    if model is not None:
        _mark(core.get_decoder(), ledger)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: ledger.rebook(p.grad, "gradients"))


def _fill(model: nn.Module, compute: torch.dtype) -> None:
    """Replace every parameter and buffer by one that has a storage, a tied one by the same."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    if id(tensor) not in made:
                        made[id(tensor)] = _filled(module, tensor, compute)
                    own[name] = made[id(tensor)]  # type: ignore[assignment]


def _filled(module: nn.Module, tensor: Tensor, compute: torch.dtype) -> Tensor:
    if in_four_bits(module) and tensor is module.weight:
        return _packed(module, compute)
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _packed(layer: Any, compute: torch.dtype) -> nn.Parameter:
    """A 4-bit weight as bitsandbytes holds it: two numbers a byte, and a scale for each block of 64."""
    from bitsandbytes.functional import QuantState

    size = layer.in_features * layer.out_features
    blocks = -(-size // _BLOCK)
    shape = torch.Size((layer.out_features, layer.in_features))
    state: dict[str, Any] = {"shape": shape, "code": torch.empty(16), "blocksize": _BLOCK, "quant_type": "nf4"}
    if layer.weight.compress_statistics:
        scales = QuantState(torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
        state |= {"offset": torch.empty(()), "state2": scales}
    absmax = torch.empty(blocks, dtype=torch.uint8 if layer.weight.compress_statistics else torch.float32)
    packed: Any = nn.Parameter(torch.empty((size + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = layer.quant_state = QuantState(absmax, dtype=compute, **state)
    packed.bnb_quantized, packed.module = True, layer
    return packed


def _task(settings: Settings, policy: Any, reference: Reference | None) -> Task:
    common = (policy, settings.optimizer, 1, 1.0)
    if settings.objective is None:
        return SFT(*common)
    # An objective's own arithmetic is on a few numbers, some of which decide what is done; here they have no data.
    objective = replace(settings.objective, ld_alpha=1.0, weighting=None)
    if objective.name not in REFERENCE_FREE:
        objective = replace(objective, name="sigmoid", options={})
    return DPO(*common, objective=objective, reference=reference)


def _step(task: Task, batch: Batch, micro_batches: int, placement: Placement, ledger: "_Ledger") -> None:
    if isinstance(getattr(task, "reference", None), Precomputed):
        batch = batch._replace(reference=torch.zeros(2 * batch.examples, dtype=torch.float64))
    # As Lightning has it: each use of a weight casts it anew.
    with torch.autocast("cpu", torch.bfloat16, enabled=placement.autocast, cache_enabled=False):
        for _ in range(micro_batches):
            ledger.begin("forward")
            loss, _ = task.loss(batch)
            loss.backward()
        ledger.begin("update")  # in place, but of all gradients at once


def _find_scales(layer: Any) -> None:
    layer.weight.quant_state = layer.quant_state


def _mark(decoder: Any, ledger: "_Ledger") -> None:
    """Let the ledger tell apart the forward and backward passes of each layer, and what comes in between."""
    count = len(decoder.layers)

    def before(place: int) -> Callable[..., None]:
        return lambda *_: ledger.enter("forward", place)

    def after(place: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: ledger.enter("backward", place))

        return hook

    for index, layer in enumerate(decoder.layers):
        place = index if index < _FEW // 2 else index - count  # from the nearer end
        layer.register_forward_pre_hook(before(place))
        layer.register_forward_hook(after(place))
    decoder.register_forward_hook(lambda *_: ledger.begin("head"))


class _Ledger(TorchDispatchMode):
    """Bytes of all storages alive, by what they are for, and the most that each moment saw."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moments: dict[Hashable, Peak] = {}
        self._vocabulary = vocabulary
        self._alive: dict[int, tuple[Any, int, str]] = {}  # storage -> weak reference, bytes, label
        self._bytes: Counter[str] = Counter()
        self._label: str | None = None
        self._passes, self._moment = 0, ("start", 0)

    def begin(self, name: str) -> None:
        """A pass through the model begins or ends."""
        self._passes += 1
        self.enter(name, 0)

    def enter(self, name: str, place: int) -> None:
        """What is booked from now on belongs to another moment."""
        self._moment = (name, place)
        self._look()

    @contextmanager
    def booking(self, label: str) -> Iterator[None]:
        """Inside, every new storage is for that."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    @contextmanager
    def gathering(self, sharded: bool, quantised: bool) -> Iterator[None]:
        """Inside, storages that change their size are followed, and what FSDP allocates is booked as such."""
        with ExitStack() as patched:
            resize = torch.UntypedStorage.resize_

            def resized(storage: Any, size: int) -> None:
                resize(storage, size)
                self._book(storage, self._alive[storage._cdata][2] if storage._cdata in self._alive else "gathered")

            patched.enter_context(patch.object(torch.UntypedStorage, "resize_", resized))
            if quantised:
                from bitsandbytes.nn import modules

                # FSDP's gathered weight is a new parameter each time
                find = "fix_4bit_weight_quant_state_from_module"
                patched.enter_context(patch.object(modules, find, _find_scales))
            if sharded:
                from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

                for name in ("unshard", "wait_for_unshard", "post_backward"):
                    patched.enter_context(patch.object(FSDPParamGroup, name, self._fsdp(getattr(FSDPParamGroup, name))))
            yield

    def _fsdp(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def booked(group: Any, *args: Any, **options: Any) -> Any:
            with self.booking("gathered"):
                result = method(group, *args, **options)
            for parameter in group.fsdp_params:
                self.rebook(parameter.sharded_param.grad, "gradients")
            return result

        return booked

    def rebook(self, tensor: Tensor | None, label: str) -> None:
        """Say what a tensor is for, now that it is known."""
        if tensor is not None:
            local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            self._book(local.untyped_storage(), label)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to its local tensors comes here again
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, FakeTensor) and (storage := result.untyped_storage())._cdata not in self._alive:
                self._book(storage, self._label or self._purpose(func, args, result))
        return results

    def _purpose(self, func: Any, args: Any, result: Tensor) -> str:
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
            return "casts"
        return "logits" if result.shape[-1:] == (self._vocabulary,) else "activations"

    def _book(self, storage: Any, label: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        alive, before, old = self._alive.get(key, (None, 0, label))
        self._alive[key] = alive or weakref.ref(storage, lambda _: self._close(key)), size, label
        self._bytes[old] -= before
        self._bytes[label] += size
        self._look()

    def _close(self, key: int) -> None:
        _, size, label = self._alive.pop(key)
        self._bytes[label] -= size

    def _look(self) -> None:
        moment = self._passes, *self._moment
        if self._passes == 0:
            return  # the model is being built
        if self._bytes.total() > self.moments.get(moment, _NOTHING).total:
            self.moments[moment] = Peak(*(float(self._bytes[label]) for label in Peak._fields))
