"""How long an optimizer step takes on N GPUs, by equations: docs/scaling.md derives them and says how well they hold.

    step = sum over rounds of (compute + waiting + exposed communication) + optimizer

In a round every rank computes one micro-batch. Sharded ranks meet in each round, so that all wait for its slowest; DDP
ranks meet once a step. Seconds and bytes throughout; B in names of sizes is bytes, "weights" are numbers of them.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean
from typing import NamedTuple, Protocol

from zephyr.data.batch import IDLE, Batch, Conversation, Pair, pack_conversations, pack_pairs
from zephyr.data.encode import shortened
from zephyr.data.packing import deal
from zephyr.planning.flops import Load, ModelSize, forward_flops, load, needed_flops
from zephyr.planning.gpus import GPU

# Shares of what the table of GPUs says that a training step gets; docs/scaling.md has the runs that they are from.
PRODUCTS = 0.9  # of `product`, in the shapes of a layer
ATTENTION = 0.5  # of that, in attention
MEMORY = 0.9  # of `bandwidth`
WIRE = 0.8  # of `link`, `network` and `host`
HOST_MEMORY = 200e9  # bytes/s of a server's memory, which its GPUs share when weights are offloaded
# Bytes that a token's forward pass through a layer moves between products (norms, rotation, gate, residuals), per unit
# of width, by whether layers are compiled; an adapter reads every input and adds to every output once more.
BETWEEN = {False: 150, True: 50}
ADAPTER = 80
_NODE = 8  # GPUs of a server whose share of `network` each has


@dataclass(frozen=True)
class Job:
    """A run, as far as its steps' time goes."""

    gpu: GPU
    size: ModelSize  # of the policy; an adapter counts as part of the body
    outside: int = 0  # weights gathered as one: embedding, head
    outside_trained: int = 0
    packed: int = 0  # weights in four bits
    processes: int = 1
    nodes: int = 1
    sharded: bool = False
    replicas: int = 1  # whole copies of the sharded model
    offload: bool = False  # shards rest in the host's memory
    compiled: bool = False
    recomputed: float = 0.0  # share of a layer's products that the backward pass computes again; 1: attention too
    forwards: int = 1  # passes in a micro-batch: a live reference makes two; a loss of the whole step doubles them
    reference: bool = False  # whether one is live, which the mathematics counts
    together: bool = False  # that reference goes beside the policy, each weight read once for both
    single: bool = False  # products in fp32
    use: int = 2  # bytes of a weight as it is gathered and multiplied
    kept: int = 4  # bytes of a trained weight, and of its gradient
    eight_bits: bool = False  # moments of the optimizer in 8 bits
    overlapping: bool = True  # GPUs compute while they communicate; gloo on a CPU does not

    @property
    def shards(self) -> int:
        """Processes that share one copy of the model."""
        return self.processes // self.replicas if self.sharded else 1

    @property
    def readings(self) -> int:
        """Forward passes in a micro-batch that find weights anew: gathered, or unpacked from four bits."""
        return self.forwards // (1 + self.together)

    @property
    def trained(self) -> int:
        """Weights that get gradients."""
        return self.size.body_trained + self.outside_trained


class Step(NamedTuple):
    """Seconds of an optimizer step, the mean over ranks."""

    compute: float
    waiting: float  # for the slowest rank
    communication: float  # that no computing hides
    optimizer: float

    @property
    def seconds(self) -> float:
        return sum(self)


class Examples(Protocol):
    """What steps are made of: packed rows of conversations, or pairs."""

    @property
    def lengths(self) -> Sequence[int]: ...

    def pack(self, examples: list[int]) -> Batch: ...


def micro_batch(job: Job, of: Load, train: bool = True) -> tuple[float, float]:
    """Seconds of computing and, with what communication adds to it, of all. Without `train` one forward pass alone."""
    forward, backward, head, head_backward = _products(job, of)
    layers, gather, edge = job.size.layers, *_gathers(job)
    passes, readings = (job.forwards, job.readings) if train else (1, 1)
    compute = passes * (layers * forward + head)
    # the first gathers have nothing to hide behind: the embedding and head, which are one, and the first layer
    total = readings * (edge + gather + layers * _both(job, passes / readings * forward, gather)) + passes * head
    if train:
        scatter, edge_scatter = _scatters(job)
        compute += layers * backward + head_backward + _touched(job)
        total += edge + gather + layers * _both(job, backward, gather + scatter) + head_backward
        total += edge_scatter + scatter + _touched(job)  # the last layer's and the embedding's gradients
    return compute, max(compute, total)


def _both(job: Job, compute: float, communicate: float) -> float:
    return max(compute, communicate) if job.overlapping else compute + communicate


def _products(job: Job, of: Load) -> tuple[float, float, float, float]:
    """Seconds of a layer's forward and backward pass, and of the head's."""
    size = job.size
    rate = (job.gpu.single if job.single else job.gpu.product) * 1e12 * PRODUCTS
    linear, head, attention = (flops / rate for flops in forward_flops(size, of))
    weights = 2.0 * size.body_trained * of.tokens / rate
    head_weights = 2.0 * size.head_trained * of.scored / rate
    attention /= ATTENTION
    width = (BETWEEN[job.compiled] + ADAPTER * (size.body_trained < size.body)) * size.width * size.layers
    between = of.tokens * width * (2 if job.single else 1) / (MEMORY * job.gpu.bandwidth * 1e9)
    again = job.recomputed * linear + (job.recomputed > 0) * between + (job.recomputed == 1) * attention
    forward, backward = linear + attention + between, linear + weights + 2 * attention + 2 * between + again
    return forward / size.layers, backward / size.layers, head, head + head_weights


def _touched(job: Job) -> float:
    """Seconds in which a micro-batch moves weights through the GPU's memory beside its products.

    What is gathered is written, then read and written once more; what is not is cast for the products of both passes.
    Gradients are cast, put together for the reduction if there is one, and added to the sum so far. Four bits are
    unpacked in each pass.
    """
    whole = job.size.body + job.outside - job.packed
    moved = job.packed * 2.5 * (job.readings + 1 + (job.recomputed > 0))
    if job.sharded:
        moved += (job.readings + 1) * 3 * job.use * whole
        moved += job.trained * (job.use + 2 * job.kept + 3 * job.kept / job.shards)
    else:
        casts = 2 * (job.use + job.kept) if job.use < job.kept else 0
        moved += job.trained * (casts + job.use + 4 * job.kept)
    return moved / (MEMORY * job.gpu.bandwidth * 1e9)


def ring(size: float, ranks: int, bandwidth: float) -> float:
    """Seconds of an all-gather to, or a reduce-scatter of, `size` bytes on each rank; an all-reduce is one of each."""
    return size * (ranks - 1) / ranks / bandwidth


def across(job: Job, ranks: int) -> float:
    """Bytes/s of a ring through so many neighbouring ranks: between servers each of their network cards carries a
    part of it."""
    a_node = job.processes // job.nodes
    slowest = job.gpu.link if ranks <= a_node else min(job.gpu.link, job.gpu.network * min(a_node, _NODE))
    return WIRE * slowest * 1e9


def _gathers(job: Job) -> tuple[float, float]:
    """Seconds in which a layer, and what is outside of layers, is gathered."""
    if not job.sharded:
        return 0.0, 0.0
    inside = ((job.size.body - job.packed) * job.use + job.packed / 2) / job.size.layers
    return _gather(job, inside), _gather(job, job.outside * job.use)


def _gather(job: Job, size: float) -> float:
    up = size / job.use * job.kept / job.shards / _host(job) if job.offload else 0.0
    return ring(size, job.shards, across(job, job.shards)) + up


def _scatters(job: Job) -> tuple[float, float]:
    """Seconds in which a layer's gradients, and those outside of layers, are summed, in each micro-batch."""
    if not job.sharded:
        return 0.0, 0.0
    return _scatter(job, job.size.body_trained / job.size.layers), _scatter(job, job.outside_trained)


def _scatter(job: Job, weights: float) -> float:
    size = weights * job.kept
    seconds = ring(size, job.shards, across(job, job.shards))
    if job.replicas > 1:  # the copies' shards are summed too, each rank's with the same one of the other copies
        own = job.gpu.network if job.nodes > 1 else job.gpu.link
        seconds += 2 * ring(size / job.shards, job.replicas, WIRE * own * 1e9)
    if job.offload:
        seconds += size / job.shards * (1 / _host(job) + 3 * job.processes / job.nodes / HOST_MEMORY)
    return seconds


def _host(job: Job) -> float:
    return WIRE * job.gpu.host * 1e9


def step(job: Job, hands: Sequence[Sequence[Load]]) -> Step:
    """The time of a step of which each rank has these micro-batches."""
    rounds = [[micro_batch(job, of) for of in each] for each in zip_longest(*hands, fillvalue=load(IDLE))]
    if not job.sharded:
        rounds = [[(sum(c for c, _ in own), sum(t for _, t in own)) for own in zip(*rounds, strict=True)]]
    slowest = [max(each) for each in rounds]
    mean = sum(fmean(compute for compute, _ in each) for each in rounds)
    exposed = sum(total - compute for compute, total in slowest)
    if not job.sharded:
        exposed += 2 * ring(job.trained * job.kept, job.processes, across(job, job.processes))
    return Step(mean, sum(compute for compute, _ in slowest) - mean, exposed, optimizer(job))


def optimizer(job: Job) -> float:
    """Seconds in which norm and clipping read the gradient twice and write it, and AdamW reads four tensors and writes
    three."""
    each = (3 + 3) * job.kept + (4 if job.eight_bits else 4 * job.kept)
    if job.offload:  # the servers share each copy of the model out among them
        return each * job.trained * job.replicas / job.nodes / HOST_MEMORY
    return each * job.trained / job.shards / (MEMORY * job.gpu.bandwidth * 1e9)


class Estimate(NamedTuple):
    """What steps drawn from the data take, in the mean."""

    step: Step
    tokens: float  # of a step, all ranks
    flops: float  # of a step, all ranks, by the mathematics: nothing computed again
    forward: float  # seconds of one forward pass over a step's examples

    def rates(self, job: Job) -> tuple[float, float]:
        """Tokens a second and GPU, and the share of the peak that the mathematics is (MFU)."""
        device_seconds = self.step.seconds * job.processes
        return self.tokens / device_seconds, self.flops / device_seconds / (job.gpu.peak * 1e12)


def estimate(job: Job, examples: Examples, batch_size: int, budget: int, seed: int = 0, draws: int = 2000) -> Estimate:
    """The mean over steps of random examples, dealt out as the run deals them. At least two steps, `draws` examples."""
    steps: list[Step] = []
    tokens, flops, forward = 0, 0.0, 0.0
    for hands in drawn(examples, batch_size, budget, job.processes, seed, max(2, draws // batch_size)):
        steps.append(step(job, hands))
        tokens += sum(of.tokens for own in hands for of in own)
        flops += sum(needed_flops(job.size, of, job.reference) for own in hands for of in own)
        for each in zip_longest(*hands, fillvalue=load(IDLE)):
            forward += max(micro_batch(job, of, train=False)[1] for of in each)
    mean = Step(*(fmean(part) for part in zip(*steps, strict=True)))
    return Estimate(mean, tokens / len(steps), flops / len(steps), forward / len(steps))


def drawn(
    examples: Examples, batch_size: int, budget: int, ranks: int, seed: int, steps: int
) -> Iterator[list[list[Load]]]:
    """Steps of random examples: each rank's micro-batches."""
    draw = random.Random(seed)
    for _ in range(steps):
        chosen = [draw.randrange(len(examples.lengths)) for _ in range(batch_size)]
        hands = deal([examples.lengths[i] for i in chosen], budget, ranks)
        yield [[load(examples.pack([chosen[i] for i in members])) for members in own] for own in hands]


# 32 pairs of UltraFeedback (prompt, chosen, rejected) in tokens of Mistral-7B-v0.1, a random one of each 32nd part by
# length of 1,193 genuine ones, cut to 1,024 and 512; the draw of which means and spread are nearest. Mean: 749 a pair.
PAIRS = [
    (59, 20, 27), (29, 36, 102), (131, 5, 73), (87, 46, 96), (45, 150, 66), (33, 178, 86), (100, 149, 86),
    (61, 155, 142), (30, 332, 63), (271, 126, 36), (167, 106, 206), (456, 5, 70), (319, 22, 196), (39, 284, 270),
    (81, 254, 303), (41, 219, 404), (480, 28, 185), (36, 569, 137), (587, 51, 142), (319, 229, 273), (73, 307, 511),
    (512, 69, 340), (174, 505, 300), (395, 306, 319), (47, 501, 498), (48, 620, 429), (189, 835, 199), (32, 768, 489),
    (87, 694, 595), (512, 512, 429), (327, 635, 574), (40, 816, 962),
]  # fmt: skip


class TypicalPairs:
    """Pairs of these lengths (prompt, chosen, rejected), whose tokens do not matter."""

    def __init__(self, lengths: Sequence[tuple[int, int, int]]) -> None:
        self.pairs = lengths
        self.lengths = [sum(pair) for pair in lengths]

    def pack(self, examples: list[int]) -> Batch:
        return pack_pairs([Pair(*([0] * length for length in self.pairs[i])) for i in examples])


class FullRows:
    """Packed rows without a gap, two thirds of each one conversation, as UltraChat's are in the mean."""

    def __init__(self, max_length: int) -> None:
        self.lengths = [max_length]

    def pack(self, examples: list[int]) -> Batch:
        first = self.lengths[0] * 2 // 3
        parts = [Conversation([0] * n, [True] * n) for n in (first, self.lengths[0] - first)]
        return pack_conversations(parts * len(examples))


def ultrafeedback(max_length: int, max_prompt_length: int) -> TypicalPairs:
    """Pairs as long as UltraFeedback's, cut as a run cuts them."""
    cut = []
    for lengths in PAIRS:
        prompt, chosen, rejected = ([0] * length for length in lengths)
        cut.append(shortened(prompt, chosen, rejected, max_length, max_prompt_length))
    return TypicalPairs([(len(prompt), len(chosen), len(rejected)) for prompt, chosen, rejected in cut])
