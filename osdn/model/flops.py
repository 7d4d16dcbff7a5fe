"""Model FLOPs: what a token of training costs by the field's convention, and what a GPU can do.

The convention is PaLM's (arXiv 2204.02311, appendix B), used for every "model FLOPs utilisation":
a multiplication and an addition are 2; forward and backward are 3 times the forward; what a kernel
does beyond the definition (chunk solves, recomputation, the causal half that a kernel may leave
out) counts for nothing. Forward, for one token:

    2 P                        P: entries of the matrices and convolutions it passes through, the
                               output layer included (tied or not), the embedding's lookup not
    4 H K T                    an attention layer over rows of T tokens, the causal mask ignored
    6 H K V                    the memory of any other layer: Sᵀk, the write, Sᵀq
    H K V                      its decay, α S, in gated_delta_net, and osdn with state decay
    7 H K                      osdn besides: s = k ⊙ k, ⟨d, s⟩, γ d + (η b x) s, d ⊙ k

so 6·P and a mixer's term for a step of training. Norms, gates and residual sums are left out.
"""

from typing import NamedTuple

import torch

from osdn.model.configuration import OSDNConfig


class Flops(NamedTuple):
    """FLOPs of one token's forward pass: dense products and convolutions, and mixers' own."""

    dense: int
    mixers: int


def forward_flops(config: OSDNConfig, seq_len: int) -> Flops:
    """One token's forward pass in rows of `seq_len` tokens."""
    # A product of [m, n] costs a token 2 m n.
    D, H = config.hidden_size, config.num_heads
    K = D // H if config.head_dim is None else config.head_dim
    V = K if config.head_v_dim is None else config.head_v_dim
    assert config.intermediate_size is not None
    dense = 2 * D * config.vocab_size  # the output layer
    mixers = 0
    for name in config.mixers:
        dense += 2 * 3 * D * config.intermediate_size  # gate, up and down
        if name == "attention":
            dense += 2 * 4 * D * H * K  # q, k, v, o
            mixers += 4 * H * K * seq_len  # q kᵀ and its product with v, over all T columns
            continue
        width = H * (2 * K + V)  # channels of the convolutions
        decays = name == "gated_delta_net" or (name == "osdn" and config.state_decay == "data")
        gates = 1 + (name == "osdn" and config.forgetting == "data") + decays
        values = 3 if config.use_output_gate else 2  # v and o, and the gate
        dense += 2 * D * H * (2 * K + values * V + gates) + 2 * config.conv_size * width
        mixers += (7 if decays else 6) * H * K * V + (7 * H * K if name == "osdn" else 0)
    return Flops(dense, mixers)


def flops_per_token(config: OSDNConfig, seq_len: int) -> int:
    """FLOPs of one token of training, forward and backward; see the module's docstring."""
    return 3 * sum(forward_flops(config, seq_len))


# The vendors' figures, TFLOP/s without sparsity: bfloat16 with float32 accumulation on the matrix
# units, and plain float32. A name is looked for in torch.cuda.get_device_name(), first come first.
PEAKS = (
    ("H100 PCIe", 756.0, 51.0),
    ("H100 NVL", 835.0, 60.0),
    ("H100", 989.4, 67.0),  # SXM5, "NVIDIA H100 80GB HBM3"
    ("GH200", 989.4, 67.0),
    ("H200", 989.4, 67.0),
    ("B200", 2250.0, 75.0),
    ("A100", 312.0, 19.5),
    ("L40S", 362.05, 91.6),
    ("RTX 4090", 165.2, 82.6),
    ("MI300X", 1307.4, 163.4),
)


def peak_flops(device_name: str, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """FLOP/s of a GPU by the name that torch.cuda.get_device_name() gives; None if not known.

    bfloat16 and float16 are the matrix units' figure, float32 the vector units' (PyTorch's default,
    without TF32).
    """
    # Any other dtype has no figure here, so that no utilisation is made up.
    columns = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 2}
    if dtype not in columns:
        return None
    found = next((row for row in PEAKS if row[0].lower() in device_name.lower()), None)
    return None if found is None else found[columns[dtype]] * 1e12  # type: ignore[operator]
