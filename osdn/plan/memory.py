"""Bytes that one GPU holds while it trains, part by part.

With N parameters over `shard` GPUs: float32 weights 4N/shard, AdamW's moments 8N/shard (Muon keeps
one, 4 bytes, of each number in the matrices of the blocks), gradients
4N/shard (and 4N more where a sharded run accumulates several passes before it exchanges them). What
is kept for the backward is counted from the tensors of a block (osdn/model) and of the kernels
(saved_like of osdn/ops/triton); r bytes a number in the residual stream, c in compute. The short
convolution keeps its input alone, which is a product.
"""

from typing import NamedTuple

import torch

from osdn.layers.osdn import ALIGNED
from osdn.model.configuration import OSDNConfig
from osdn.model.loss import CHUNK_LOGITS
from osdn.model.modeling import OSDNForCausalLM
from osdn.plan.hardware import FRAGMENTS, RESERVE
from osdn.train.muon import block_matrices
from osdn.train.recipe import Train

CHUNK, SPAN = 64, 8  # tokens in a chunk of the kernels, chunks in a span


class Model(NamedTuple):
    """Parameters in all, in the largest block, outside the blocks, and those Muon would take."""

    parameters: int
    block: int
    root: int
    matrices: int


def count_model(config: OSDNConfig) -> Model:
    """The model's parameters, from the model itself on the meta device."""
    with torch.device("meta"):
        model = OSDNForCausalLM(config)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.model.layers]
    total = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in block_matrices(model))
    return Model(total, max(blocks), total - sum(blocks), matrices)


class Memory(NamedTuple):
    """Bytes of one GPU; `workspace`: of the loss, or of a block made again, as one comes after the
    other; the larger.
    """

    weights: float
    gradients: float
    optimizer: float
    compute_copies: float
    activations: float
    workspace: float

    @property
    def tensors(self) -> float:
        """All of them."""
        return float(sum(self))

    @property
    def total(self) -> float:
        """With what the allocator and the libraries take."""
        return self.tensors * FRAGMENTS.value + RESERVE.value


def heads(config: OSDNConfig) -> tuple[int, int, int]:
    """(H, K, V)."""
    H = config.num_heads
    K = config.hidden_size // H if config.head_dim is None else config.head_dim
    return H, K, K if config.head_v_dim is None else config.head_v_dim


def decays(config: OSDNConfig, name: str) -> bool:
    """Whether the memory of such a layer decays."""
    return name == "gated_delta_net" or (name == "osdn" and config.state_decay == "data")


def joint_columns(config: OSDNConfig, name: str) -> int:
    """Columns of the product that makes q, k, v and the gates of such a layer in training."""
    H, K, V = heads(config)
    gates = 1 + (name == "osdn" and config.forgetting == "data") + decays(config, name)
    return -(-H * (2 * K + V + gates) // ALIGNED) * ALIGNED


def kernel_bytes(config: OSDNConfig, name: str, c: int) -> float:
    """What the kernels of a layer that is not attention keep for the backward, for one token.

    x and d at chunk starts in float32; w and A; e; the memory at the start of every span. Where d
    moves: the inverse of phase 1, and with a box a bit for each number of d. With a decay: that
    between the tokens of a chunk, the reads with it, and two float32 numbers (saved_like of
    osdn/ops/triton, long rows).
    """
    H, K, V = heads(config)
    kept = 4 + 4 * K / CHUNK + c * K + c * CHUNK + c * V + c * K * V / (CHUNK * SPAN)
    if name == "osdn":
        kept += c * CHUNK + (K / 8 if config.precond_min is not None else 0)
    if decays(config, name):
        kept += 2 * c * CHUNK + 8
    return H * kept


def kept_by_block(config: OSDNConfig, name: str, train: Train, *, r: int, c: int) -> float:
    """Bytes a token that a block of mixer `name` keeps from its forward to its backward."""
    D, I = config.hidden_size, config.intermediate_size
    assert I is not None
    if train.activation_checkpointing == "full":
        return r * D
    H, K, V = heads(config)
    linear = name != "attention"
    widths = H * (2 * K + V) if linear else 3 * H * K
    out = c * H * (V if linear else K)  # o
    kernels = kernel_bytes(config, name, c) if linear else 4 * H
    joint = joint_columns(config, name) if linear else widths  # q, k, v, and the gates' logits
    products = c * joint + out + 2 * c * I  # these; o; gate and up
    if train.activation_checkpointing == "selective":
        outputs = c * D * (1 if train.compile else 2)  # o_proj's; down_proj's, which nobody reads
        return r * D + products + outputs + kernels
    inputs = 2 * c * D + (out if linear else 0) + c * I  # of products: normed, and silu(gate) · up
    moved = c * widths if linear else 0  # convolved and normed
    if train.compile:
        return r * D + products + inputs + moved + c * D + kernels
    gated = (0 if linear else out + c * widths) + c * I  # silu(gate); rotated
    return 2 * r * D + products + inputs + moved + gated + kernels


def memory(config: OSDNConfig, model: Model, train: Train, *, shard: int, passes: int) -> Memory:
    """Bytes of one GPU whose weights are divided over `shard`, with `passes` in a step."""
    bfloat16 = train.precision == "bfloat16"
    c = 2 if bfloat16 else 4
    r = 4 if shard == 1 else c  # autocast leaves the residual stream in float32
    tokens, D, N = train.rows * train.seq_len, config.hidden_size, model.parameters
    if shard == 1:  # autocast's; a compiled block that is made again casts its own again
        remade = train.compile and train.activation_checkpointing != "none"
        copies = 2.0 * (model.block if remade else N - model.root) if bfloat16 else 0.0
    else:  # the root, and a block in use beside the next one, with their gradients
        copies = (c + 4.0) * model.root + 2 * (2 * c + 4.0) * model.block
    moments = 8.0 * N - 4.0 * (model.matrices if train.optimizer.name == "muon" else 0)
    gradients = 4.0 * N / shard + (4.0 * N if shard > 1 and passes > 1 else 0)
    kept = [kept_by_block(config, name, train, r=r, c=c) for name in config.mixers]
    plain = train.model_copy(update={"activation_checkpointing": "none"})
    whole = [kept_by_block(config, name, plain, r=r, c=c) for name in config.mixers]
    again = max(one - other for one, other in zip(whole, kept))  # beside what is there anyway
    masked = "attention" in config.mixers and not bfloat16  # as a boolean, and as a bias
    masks = 4.0 * tokens**2 * masked
    rows = min(tokens, max(1, CHUNK_LOGITS // config.vocab_size))
    cast = c if c != r else 0  # of the final hidden states and of the output layer's weight
    loss = rows * config.vocab_size * (2 * c + 4.0) + (4.0 + cast) * config.vocab_size * D
    loss += tokens * (r + cast + c) * D  # these hidden states and their gradient
    activations = tokens * (sum(kept) + r * D) + masks
    workspace = max(loss, tokens * again)
    return Memory(4.0 * N / shard, gradients, moments / shard, copies, activations, workspace)
