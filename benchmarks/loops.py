"""The two sides of a comparison: Zephyr's own training loop and TRL's, on the same weights, tokens and order."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from benchmarks.shapes import InMemory, in_order_of, perturb_adapter
from zephyr import settings
from zephyr.data.batch import Pair

SEED = 11
LR = 1e-5
BETA = 0.1
MAX_LENGTH = 1024  # no example is longer, so neither side cuts one
MICRO_BATCH_TOKENS = 8192  # of the 7B recipes
_CONF = Path(__file__).parents[1] / "conf" / "train.yaml"
StepEnded = Callable[[], None]


@dataclass
class Job:
    """What is trained, for both sides."""

    steps: list[list[Any]]  # examples of each optimizer step
    reference: Path  # folder of the reference's weights; of an adapter's base
    policy: Path
    lora: bool = False
    precomputed: bool = False
    checkpointing: str = "none"  # Zephyr's activation checkpointing
    device: str = "cpu"
    precision: str = "32-true"
    optimizer: str = "adamw"  # Zephyr's name of it
    compile: bool = False
    quantization: str | None = None

    @property
    def placement(self) -> Any:
        """Where and how Zephyr holds the model."""
        from zephyr.models.policy import Placement

        return Placement(torch.device(self.device), self.precision, compile=self.compile)  # type: ignore[arg-type]

    @property
    def preference(self) -> bool:
        """Whether the examples are pairs."""
        return isinstance(self.steps[0][0], Pair)


@dataclass
class Record:
    """What a side says of its training."""

    losses: list[float] = field(default_factory=list)  # of each step
    wants_gradient: bool = True
    gradient: dict[str, Tensor] = field(default_factory=dict)  # of the first step, before it is clipped

    def keep(self, named: Iterator[tuple[str, nn.Parameter]], norm: float) -> None:
        """Keep a step's gradient. It may be clipped, or a sum in place of a mean: `norm` is that of the gradient."""
        self.wants_gradient = False
        taken = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
        scale = norm / nn.utils.get_total_norm(list(taken.values())).item()
        self.gradient = {name: gradient * scale for name, gradient in taken.items()}


def defaults(group: str, **changes: Any) -> dict[str, Any]:
    """A group of the configuration as a user gets it, but for these keys."""
    return {**yaml.safe_load(_CONF.read_text())[group], **changes}


LORA = settings.Lora(16, 16.0, 0.0, "all-linear", False, False)


def zephyr_task(job: Job) -> tuple[Any, InMemory]:
    """Zephyr's task and its examples."""
    from zephyr.dpo import DPO
    from zephyr.models.policy import load_policy
    from zephyr.models.reference import AdapterOff, Copy, Precomputed
    from zephyr.sft import SFT

    changes: dict[str, Any] = {"base": str(job.policy), "lora": LORA if job.lora else None}
    changes |= {"activation_checkpointing": job.checkpointing, "quantization": job.quantization}
    model, placement = settings.Model(**defaults("model", **changes)), job.placement
    start = job.reference if job.lora else job.policy
    policy = load_policy(str(start), None, model, placement)
    if job.lora:
        perturb_adapter(policy)
    changes = {"name": job.optimizer, "lr": LR, "schedule": "constant_with_warmup", "warmup_ratio": 0.0}
    optimizer = settings.Optimizer(**defaults("optimizer", **changes))
    common = policy, optimizer, len(job.steps), float(len(job.steps))
    examples = InMemory(in_order_of(SEED, [example for step in job.steps for example in step]))
    if not job.preference:
        return SFT(*common), examples
    objective = settings.Objective("sigmoid", BETA, "reverse_kl", 0.5, None, 1.0, 0.0, {})
    if job.lora:
        return DPO(*common, objective=objective, reference=AdapterOff(False)), examples
    frozen = load_policy(str(job.reference), None, model, placement, frozen=True)
    if not job.precomputed:
        return DPO(*common, objective=objective, reference=Copy(frozen)), examples
    task = DPO(*common, objective=objective, reference=Precomputed())
    rounding = torch.autocast(placement.device.type, torch.bfloat16, enabled=placement.autocast)
    with torch.no_grad(), rounding:
        found = [
            task.sequence_logps(frozen, examples.pack([i]).to(placement.device)) for i in range(len(examples.given))
        ]
    examples.reference = torch.stack(found).cpu()
    return task, examples


def zephyr_loop(job: Job, record: Record, folder: Path, step_ended: StepEnded) -> None:
    """Lightning's loop around Zephyr's task, fed by Zephyr's loader."""
    import lightning as L
    from torch.utils.data import DataLoader

    from zephyr.data.modules import Steps
    from zephyr.observe.metrics import MetricsFile
    from zephyr.observe.throughput import Throughput

    task, examples = zephyr_task(job)
    steps = Steps(examples, len(job.steps[0]), MICRO_BATCH_TOKENS, len(job.steps), SEED)

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
            record.losses.append(float(trainer.callback_metrics["train/loss"]))
            if record.wants_gradient:
                record.keep(task.policy.named_parameters(), float(trainer.callback_metrics["train/grad_norm"]))
            step_ended()

    trainer = L.Trainer(
        accelerator="cpu" if job.device == "cpu" else "gpu",
        devices=1,
        precision="bf16-mixed" if job.placement.autocast else "32-true",
        max_epochs=1,
        inference_mode=False,
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        callbacks=[Throughput(reference=job.preference and not job.precomputed), Watch()],
        logger=MetricsFile(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    pinned = torch.cuda.is_available()
    trainer.fit(task, DataLoader(steps, batch_size=None, generator=torch.Generator(), pin_memory=pinned))


_compact = threading.local()


def _score_completions_only(on: bool) -> None:
    """Let TRL leave prompt positions out of the head, as it does on CUDA but not on a CPU; in this thread."""
    import trl.trainer.utils as internals

    real = getattr(internals, "_real_use_triton", None) or internals._use_triton
    internals._real_use_triton = real  # type: ignore[attr-defined]
    internals._use_triton = lambda device: getattr(_compact, "on", False) or real(device)  # type: ignore[assignment]
    _compact.on = on


def common_options(job: Job, folder: Path) -> dict[str, Any]:
    """What a trainer of transformers' is told in order to train as Zephyr does."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(job.steps[0]),
        "max_steps": len(job.steps),
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": job.precision != "32-true",
        "use_cpu": job.device == "cpu",
        "dataloader_pin_memory": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def peft_adapter() -> Any:
    """LORA as PEFT has it."""
    from peft import LoraConfig

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=LORA.rank, lora_alpha=16, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM")


def trl_trainer(job: Job, folder: Path, best: bool, dtype: torch.dtype | None = None, **changes: Any) -> Any:
    """TRL's trainer: as it comes, or at its `best`, without checkpointing and scoring completions alone.

    `dtype` is that of the weights, fp32 unless given; `changes` are for TRL's own configuration.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from benchmarks.tokens import word_tokenizer

    _score_completions_only(best)
    options: dict[str, Any] = {
        **common_options(job, folder),
        "max_length": MAX_LENGTH,
        "train_sampling_strategy": "sequential",
        **({"gradient_checkpointing": False} if best else {}),
        **changes,
    }
    kind: dict[str, Any] = {"dtype": dtype or torch.float32}
    start = job.reference if job.lora else job.policy
    model = AutoModelForCausalLM.from_pretrained(str(start), **kind)
    examples = [example for step in job.steps for example in step]
    common: dict[str, Any] = {"model": model, "processing_class": word_tokenizer(model.config.vocab_size)}
    if job.lora:
        common["peft_config"] = peft_adapter()
    elif job.preference:
        common["ref_model"] = AutoModelForCausalLM.from_pretrained(str(job.reference), **kind)

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # both sides are given token ids

    trainer: Any
    if job.preference:
        rows = Dataset.from_list([{f"{name}_ids": ids for name, ids in pair._asdict().items()} for pair in examples])
        args = DPOConfig(precompute_ref_log_probs=job.precomputed, beta=BETA, **options)
        trainer = Tokenised(args=args, train_dataset=rows, **common)
    else:
        rows = Dataset.from_list([{"input_ids": example.ids} for example in examples])
        trainer = SFTTrainer(args=SFTConfig(**options), train_dataset=rows, **common)
    if job.lora:
        perturb_adapter(trainer.model)
    return trainer


def trl_loop(job: Job, record: Record, folder: Path, best: bool, step_ended: StepEnded, **changes: Any) -> None:
    """TRL's own loop; the changes are those of `trl_trainer`."""
    run_trainer(trl_trainer(job, folder, best, **changes), record, step_ended)


def run_trainer(trainer: Any, record: Record, step_ended: StepEnded) -> None:
    """The loop of a trainer that is one of transformers'."""
    from transformers import TrainerCallback

    clip, loss_of = trainer.accelerator.clip_grad_norm_, trainer.compute_loss

    def first_clip(parameters: Any, *args: Any, **options: Any) -> Any:
        if record.wants_gradient:
            norm = nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
            record.keep(trainer.model.named_parameters(), norm.item())
        trainer.accelerator.clip_grad_norm_ = clip
        return clip(parameters, *args, **options)

    def watched(*args: Any, **options: Any) -> Any:
        loss = loss_of(*args, **options)
        record.losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
        return loss

    trainer.accelerator.clip_grad_norm_, trainer.compute_loss = first_clip, watched

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **options: Any) -> None:
            step_ended()

    trainer.add_callback(Watch())
    trainer.train()


def settled(model: Any, folder: Path) -> None:
    """Save a model, and let its memory go."""
    model.save_pretrained(folder)
    model.to("meta")
