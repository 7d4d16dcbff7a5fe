"""The functions of transformers' gated models, as these call them, by this library's operator.

rule           online_scaled_delta_rule with log_alpha = g; where the layer is not an upgraded one
               with η = 0, which is the gated delta rule:
               S̃_t = e^{g_t} S_{t−1}
               S_t = S̃_t + β_t k_t (v_t − S̃_tᵀ k_t)ᵀ,  o_t = K^-½ S_tᵀ q_t
convolution    short_convolution, in the layout the projections write, without a transposed copy
"""

import inspect
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from osdn.ops import online_scaled_delta_rule, online_scaled_delta_step
from osdn.ops.convolution import short_convolution

MODELS = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "qwen4_exp")
KNOWN = "5.19 to 5.24"  # transformers versions whose functions have the signatures below
RULE = ("query", "key", "value", "g", "beta", "chunk_size", "initial_state", "output_final_state",
        "use_qk_l2norm_in_kernel", "kwargs")  # fmt: skip
SIGNATURES = {
    "torch_chunk_gated_delta_rule": RULE,
    "torch_recurrent_gated_delta_rule": tuple(name for name in RULE if name != "chunk_size"),
    "causal_conv1d_fn": ("hidden_states", "weight", "bias", "activation", "kwargs"),
}
L2_EPS = 1e-6  # transformers' and FLA's: x · rsqrt(Σx² + 1e-6)
SHORTEST = 1e-9  # padding has a key of 0


class Preconditioned(NamedTuple):
    """What an upgraded layer adds to the rule: d_1 [Hv, K], and eta and the box."""

    start: Tensor
    options: dict[str, Any]


def known_modules() -> list[ModuleType]:
    """The models' modules that this transformers has, each with the functions as we know them."""
    found = []
    for model in MODELS:
        name = f"transformers.models.{model}.modeling_{model}"
        if find_spec(f"transformers.models.{model}") is None:
            continue  # an older transformers, without this model
        module = import_module(name)
        for function, parameters in SIGNATURES.items():
            original = getattr(module, function, None)
            there = () if original is None else tuple(inspect.signature(original).parameters)
            if there != parameters:
                raise RuntimeError(
                    f"transformers: expected {name}.{function}{parameters}, got {there}; osdn "
                    f"knows transformers {KNOWN}, and this is {transformers.__version__}"
                )
        found.append(module)
    return found


def rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    preconditioned: Preconditioned | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule as transformers calls it, or the online scaled one.

    query, key [B, T, Hk, K], value [B, T, Hv, V], g (log decay, ≤ 0) and beta [B, T, Hv],
    initial_state [B, Hv, K, V] -> (o [B, T, Hv, V] in query's dtype, final state float32 or None).
    Value head h reads key head h // (Hv / Hk). In float32 throughout, as transformers does.

    preconditioned: the layer's own start d_1 and options; None: η = 0 and d = 1, the plain rule.
        With it a state is [B, Hv, K, V + 1]: the memory, and d in the last column, so that
        transformers' caches keep both.
    """
    group = value.shape[2] // key.shape[2]
    q, k, v = query.float(), key.float(), value.float()
    if use_qk_l2norm_in_kernel:
        q, k = _unit(q), _unit(k)
    if group > 1:
        q, k = q.repeat_interleave(group, dim=2), k.repeat_interleave(group, dim=2)
    beta, g = beta.float(), g.float()
    options: dict[str, Any] = {"eta": 0.0}
    S: Any
    d: Any = None
    if preconditioned is not None:
        options, d = preconditioned.options, preconditioned.start.float()  # [Hv, K]
        k, v, beta = _with_unit_keys(k, v, beta)
        if initial_state is not None:
            initial_state, d = initial_state.float().split([value.shape[-1], 1], dim=-1)
            d = d.squeeze(-1)  # [B, Hv, K]
    wanted = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, g, beta, initial_state, d)
    )
    if key.shape[1] == 1 and initial_state is not None and cu_seqlens is None and not wanted:
        S = initial_state.float().clone(memory_format=torch.contiguous_format)
        d = S.new_ones(S.shape[:3]) if d is None else d.clone(memory_format=torch.contiguous_format)
        o, S, d = online_scaled_delta_step(
            q[:, 0], k[:, 0], v[:, 0], beta[:, 0], log_alpha=g[:, 0], state=S, precond=d, **options
        )
        o = o[:, None]
    else:
        o, S, d = online_scaled_delta_rule(
            q, k, v, beta, log_alpha=g, output_final_state=output_final_state,
            initial_state=None if initial_state is None else initial_state.float(),
            initial_precond=d, cu_seqlens=cu_seqlens, **options,
        )  # fmt: skip
    if not output_final_state:
        return o.to(query.dtype), None
    final = S if preconditioned is None else torch.cat([S, d[..., None]], dim=-1)
    return o.to(query.dtype), final


def _unit(x: Tensor) -> Tensor:
    # vector_norm makes no tensor of squares, which would double the time.
    return x * torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() + L2_EPS)


def _with_unit_keys(k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same write with a key of length 1: k/c, v/c and β c² for c = ‖k‖.

    S̃ + β k (v − S̃ᵀk)ᵀ = S̃ + β c² (k/c) (v/c − S̃ᵀk/c)ᵀ. transformers' own normalisation leaves
    short keys shorter than 1, and then a preconditioner would leave 1.
    """
    c = torch.linalg.vector_norm(k, dim=-1, keepdim=True).clamp(min=SHORTEST)
    return k / c, v / c, beta * c.squeeze(-1).square()


def convolution(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Causal depthwise convolution and SiLU of [B, D, T], as transformers calls it.

    cu_seq_lens_q: [N + 1] offsets of documents packed along T; none sees its neighbour.

    Raises:
        ValueError: a bias or another activation, which none of these models has.
    """
    if bias is not None or activation not in ("silu", "swish"):
        raise ValueError(
            f"causal_conv1d_fn: expected no bias and activation 'silu', got activation "
            f"{activation!r} and {'a' if bias is not None else 'no'} bias; leave accelerate() out"
        )
    x = hidden_states.transpose(1, 2)  # [B, T, D], as the projection wrote it
    return short_convolution(x, weight, cu_seq_lens_q).transpose(1, 2)
