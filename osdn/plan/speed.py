"""Seconds of one optimiser step, part by part: rooflines on measured rates, and communication.

A part that computes takes its FLOPs over a rate or its bytes over one, whichever is measured for
it; collectives move the volumes of ring algorithms:

    one process for each GPU, all with all weights (DDP)   all-reduce of 4N bytes a step
    sharded (FSDP2)   all-gather of the compute weights in the forward and in the backward of each
                      pass, reduce-scatter of 4N bytes a step
    both (HSDP)       the latter within a group, and all-reduce of 4N/shard over the groups

each (n − 1)/n of its volume over the slowest link of a ring of n GPUs, twice for an all-reduce.
"""

from typing import NamedTuple

from osdn.model.configuration import OSDNConfig
from osdn.model.flops import forward_flops
from osdn.plan import hardware
from osdn.plan.hardware import H100, Gpu
from osdn.plan.memory import Model, heads
from osdn.train.recipe import Train


class Step(NamedTuple):
    """Seconds of a step on one GPU.

    exposed: the communication that nothing hides.  launches: what starting the kernels takes beyond
    the kernels' own time, which is all of a small model's step.
    """

    products: float
    mixers: float
    traffic: float
    loss: float
    optimizer: float
    exposed: float
    launches: float

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(self))

    @property
    def bottleneck(self) -> str:
        """The part that takes longest, in words."""
        words = ("the dense matrix products", "the mixers' kernels", "memory traffic between them",
                 "the output layer and its loss", "the optimiser", "communication",
                 "starting the kernels")  # fmt: skip
        return words[max(range(len(self)), key=lambda i: self[i])]


class Rates(NamedTuple):
    """A GPU's FLOP/s in products and bytes/s, and how its kernels compare with the H100's."""

    matmul: float
    copy: float
    slower: float


def rates(gpu: Gpu, train: Train) -> Rates:
    """Measured on the H100; elsewhere in proportion to the vendor's figures."""
    compute, traffic = gpu.peak() / H100.peak(), gpu.bandwidth / H100.bandwidth
    return Rates(
        hardware.MATMUL.value * gpu.peak(train.precision) / H100.peak(),
        hardware.COPY.value * traffic,
        max(1 / compute, 1 / traffic) if gpu is not H100 else 1.0,
    )


def operator(config: OSDNConfig, name: str) -> tuple[float, float]:
    """(forward, backward) seconds of one layer's operator on an H100, for one token."""
    H, K, V = heads(config)
    rule = "delta_net"
    if name == "osdn":
        rule = "osdn" if config.precond_min is None else "osdn_box"
        rule = "osdn_forgetting" if config.forgetting == "data" else rule
    forward, both = hardware.OPERATOR_MS[rule]
    scale = 1e-3 / hardware.OPERATOR_TOKEN_HEADS * H * (K + V) / 256
    return forward * scale, (both - forward) * scale


def step_seconds(
    config: OSDNConfig, model: Model, train: Train, gpu: Gpu, *, gpus: int, shard: int, passes: int
) -> Step:
    """One step of `passes` passes on each of `gpus` GPUs, weights divided over `shard`."""
    rate, c = rates(gpu, train), 2 if train.precision == "bfloat16" else 4
    r = 4 if shard == 1 else c
    tokens, D, V = train.rows * train.seq_len, config.hidden_size, config.vocab_size
    again = {"none": 0, "selective": 0, "full": 1}[train.activation_checkpointing]
    head = 2 * D * V
    dense = forward_flops(config, train.seq_len).dense - head
    products = tokens * dense * (3 + again) / (rate.matmul * hardware.GEMM_SHARE.value)
    # By mixer, since a hybrid's layers differ in all three.
    mixers = traffic = remade = 0.0
    for name in config.mixers:
        once = _traffic(config, name, r, c)
        traffic += 3 * once  # forward once, backward about twice
        if train.activation_checkpointing != "none":
            remade += once - 3 * r * D  # the block's last sum is not wanted again
        if name == "attention":
            H, K, _ = heads(config)
            # Flash attention, which takes bfloat16, passes over what causality and packing hide.
            seen = train.seq_len / 2 if c == 2 else tokens
            attention = 4 * H * K * seen
            share = hardware.ATTENTION_SHARE.value
            mixers += tokens * attention * (3.5 + again) / (rate.matmul * share)
        else:
            forward, backward = operator(config, name)
            mixers += tokens * (forward * (1 + again) + backward) * rate.slower
    moved = tokens * (traffic + remade) / (rate.copy * hardware.TRAFFIC_SHARE.value)
    if not train.compile:
        moved *= hardware.EAGER.value
    # Products as large as those whose rate was measured, and three passes over the logits.
    loss = tokens * (3 * head / rate.matmul + 3 * 2 * c * V / rate.copy)
    update = 28.0 * model.parameters / shard / rate.copy  # 4 numbers read, 3 written
    backward = passes * (products + mixers + moved) * 2 / 3
    exposed = _exposed(model, gpu, c, gpus, shard, passes, backward)
    parts = (passes * products, passes * mixers, passes * moved, passes * loss, update)
    kernels = hardware.KERNELS.value * (1 if train.compile else hardware.EAGER.value)
    # A host that launches slower than the GPU computes: the difference is waited for.
    starts = passes * len(config.mixers) * kernels * hardware.LAUNCH.value
    return Step(*parts, exposed, max(0.0, starts - sum(parts)))


def _traffic(config: OSDNConfig, name: str, r: int, c: int) -> float:
    """Bytes a token that a block's forward moves outside of its products and its operator."""
    D, I = config.hidden_size, config.intermediate_size
    assert I is not None
    H, K, V = heads(config)
    mixer = 2 * c * H * (2 * K + V)  # convolution and norm, or rotary: read and written
    norms = 2 * (r + c) * D + 2 * c * H * V
    return mixer + norms + 2 * 3 * r * D + 3 * c * I


def ring_seconds(volume: float, members: int, across: int, gpu: Gpu) -> float:
    """A ring all-gather or reduce-scatter of `volume` bytes: `members` GPUs in `across` machines.

    Between machines all GPUs of a machine share the load of its adapters.
    """
    if members == 1:
        return 0.0
    speed = gpu.link
    if across > 1:
        speed = min(gpu.link, gpu.network * min(gpu.machine, members / across))
    share = volume * (members - 1) / members  # a ring passes on all but its own part
    return share / (speed * hardware.LINK_SHARE.value) + (across - 1) * hardware.HOP.value


def _exposed(
    model: Model, gpu: Gpu, c: int, gpus: int, shard: int, passes: int, backward: float
) -> float:
    """Seconds of communication that the backward does not hide."""
    N, machines = model.parameters, -(-gpus // gpu.machine)
    within = min(machines, -(-shard // gpu.machine))  # machines of one group that shares weights
    total = 0.0
    if shard > 1:
        # weights, forward and backward
        total += 2 * passes * ring_seconds(c * N, shard, within, gpu)
        total += ring_seconds(4.0 * N, shard, within, gpu)  # gradients, scattered once a step
    groups = gpus // shard
    if groups > 1:
        between = min(machines, groups)
        # all-reduce: both halves of the ring
        total += 2 * ring_seconds(4.0 * N / shard, groups, between, gpu)
    bucket = 2 * ring_seconds(4.0 * model.block / shard, gpus, machines, gpu)  # the last one's
    # The last bucket's exchange has no backward left to hide behind.
    return max(total - hardware.OVERLAP.value * backward, min(total, bucket))
