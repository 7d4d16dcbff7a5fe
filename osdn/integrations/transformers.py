"""transformers' own Gated DeltaNet models on a CPU, by this library's operator.

    from osdn.integrations.transformers import accelerate

    accelerate()                    # from here on, until accelerate().restore()
    with accelerate():              # or only within the block
        model.generate(...)

transformers' gated models (Qwen3-Next, Qwen3.5, OLMo-Hybrid) compute the gated delta rule on a CPU
with a PyTorch loop over chunks. Where flash-linear-attention is installed they call its GPU kernels
instead, and fail on a CPU. `accelerate` replaces three functions of each model's module:

    torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule
        online_scaled_delta_rule with η = 0 and log_alpha = g, which is the gated delta rule:
        S̃_t = e^{g_t} S_{t−1},  S_t = S̃_t + β_t k_t (v_t − S̃_tᵀ k_t)ᵀ,  o_t = K^-½ S_tᵀ q_t
    causal_conv1d_fn
        short_convolution, in the layout the projections write, without a transposed copy

Tensors on other devices take transformers' own functions, unchanged.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, TracebackType
from typing import Any

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


class accelerate:
    """Replace transformers' functions at once; restore them at the end of a `with`, or by hand.

    Doing it twice changes nothing, and what was replaced is restored only by the one that did it.

    Raises:
        RuntimeError: the functions of the installed transformers have another signature. Nothing
            is changed then.
    """

    def __init__(self) -> None:
        self._replaced: list[tuple[ModuleType, str, Callable[..., Any]]] = []
        for module in _modules():
            for name in SIGNATURES:
                original = getattr(module, name)
                if not hasattr(original, "osdn_original"):
                    self._replaced.append((module, name, original))
        for module, name, original in self._replaced:
            ours = _convolution if name == "causal_conv1d_fn" else _rule
            setattr(module, name, _on_cpu(ours, original))

    def restore(self) -> None:
        """Put transformers' own functions back."""
        for module, name, original in self._replaced:
            setattr(module, name, original)
        self._replaced = []

    def __enter__(self) -> "accelerate":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def _modules() -> list[ModuleType]:
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
                    f"accelerate: expected {name}.{function}{parameters}, got {there}; it knows "
                    f"transformers {KNOWN}, and this is {transformers.__version__}"
                )
        found.append(module)
    return found


def _on_cpu(ours: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`ours` where the first tensor is on a CPU, else transformers' function."""

    def choose(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        function = ours if first.device.type == "cpu" else original
        return function(first, *args, **kwargs)

    choose.osdn_original = original  # type: ignore[attr-defined]
    choose.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return choose


def _rule(
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
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule as transformers calls it.

    query, key [B, T, Hk, K], value [B, T, Hv, V], g (log decay, ≤ 0) and beta [B, T, Hv],
    initial_state [B, Hv, K, V] -> (o [B, T, Hv, V] in query's dtype, final state float32 or None).
    Value head h reads key head h // (Hv / Hk). In float32 throughout, as transformers does.
    """
    group = value.shape[2] // key.shape[2]
    q, k, v = query.float(), key.float(), value.float()
    if use_qk_l2norm_in_kernel:
        q, k = _unit(q), _unit(k)
    if group > 1:
        q, k = q.repeat_interleave(group, dim=2), k.repeat_interleave(group, dim=2)
    beta, g = beta.float(), g.float()
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, beta))
    if key.shape[1] == 1 and initial_state is not None and cu_seqlens is None and not wanted:
        state = initial_state.to(torch.float32, copy=True).contiguous()
        ones = state.new_ones(state.shape[:3])  # d, which η = 0 leaves at 1
        o, state, _ones = online_scaled_delta_step(
            q[:, 0], k[:, 0], v[:, 0], beta[:, 0], log_alpha=g[:, 0],
            state=state, precond=ones, eta=0.0,
        )  # fmt: skip
        return o[:, None].to(query.dtype), state if output_final_state else None
    o, final, _d = online_scaled_delta_rule(
        q, k, v, beta, log_alpha=g, eta=0.0, output_final_state=output_final_state,
        initial_state=None if initial_state is None else initial_state.float(),
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return o.to(query.dtype), final


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def _convolution(
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
