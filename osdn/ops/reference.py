"""The definition: the online scaled delta rule token by token, in float64, under plain autograd.

This file is the paper (arXiv 2605.13473, in the notation of docs/explanation/operator.md) and the
truth that every other backend is tested against. Per batch element and head, with s_t = k_t ⊙ k_t:

    e_t     = v_t − S_{t−1}ᵀ k_t                          residual
    S_t     = S_{t−1} + β_t (d_t ⊙ k_t) e_tᵀ              preconditioned gradient step
    o_t     = scale · S_tᵀ q_t                            read
    x_t     = 1 − b_t ⟨d_t, s_t⟩                          b_t = β_t if beta_aware else 1
    d_{t+1} = clip(γ_t d_t + η b_t x_t s_t, d_min, d_max) hypergradient step, with forgetting γ_t
"""

from __future__ import annotations

import torch
from torch import Tensor

from osdn.ops.operands import Rule


def write(S: Tensor, d: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The memory after one token. S [..., K, V], d and k [..., K], v [..., V], beta [...]."""
    e = v - torch.einsum("...kv,...k->...v", S, k)
    return S + beta[..., None, None] * (d * k)[..., :, None] * e[..., None, :]


def adapt(d: Tensor, k: Tensor, beta: Tensor, log_gamma: Tensor | None, rule: Rule) -> Tensor:
    """The preconditioner after one token. d and k [..., K], beta and log_gamma [...]."""
    s = k * k
    b = beta if rule.beta_aware else torch.ones_like(beta)
    x = 1 - b * (d * s).sum(-1)
    decayed = d if log_gamma is None else log_gamma.exp()[..., None] * d
    u = decayed + rule.eta * (b * x)[..., None] * s
    return u if rule.precond_min is None else u.clamp(rule.precond_min, rule.precond_max)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    initial_state: Tensor,
    initial_precond: Tensor,
    cu_seqlens: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final_state, final_precond): the recurrence over every sequence, computed in float64.

    Shapes as in osdn.ops.interface; o has v's dtype, the final states are float64.
    """
    gates = (beta,) if log_gamma is None else (beta, log_gamma)
    inputs = [x.double() for x in (q, k, v, *gates)]
    S0, d0 = initial_state.double(), initial_precond.double()
    if cu_seqlens is None:
        o, S, d = _scan(inputs, S0, d0, rule)
        return o.to(v.dtype), S, d
    runs = [
        _scan([x[:, start:end] for x in inputs], S0[n : n + 1], d0[n : n + 1], rule)
        for n, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()))
    ]
    o, S, d = (torch.cat(parts, dim) for parts, dim in zip(zip(*runs), (1, 0, 0)))
    return o.to(v.dtype), S, d


def _scan(inputs: list[Tensor], S: Tensor, d: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over one stretch: inputs [B, T, H, ...], S [B, H, K, V], d [B, H, K]."""
    outputs = []
    for q, k, v, beta, *gates in zip(*(x.unbind(1) for x in inputs)):
        S = write(S, d, k, v, beta)
        d = adapt(d, k, beta, gates[0] if gates else None, rule)
        outputs.append(rule.scale * torch.einsum("...kv,...k->...v", S, q))
    return torch.stack(outputs, 1), S, d


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    state: Tensor,
    precond: Tensor,
    rule: Rule,
) -> Tensor:
    """One token: updates state [B, H, K, V] and precond [B, H, K] in place, returns o [B, H, V]."""
    gates = (beta,) if log_gamma is None else (beta, log_gamma)
    inputs = [x.double()[:, None] for x in (q, k, v, *gates)]
    o, S, d = _scan(inputs, state.double(), precond.double(), rule)
    state.copy_(S)
    precond.copy_(d)
    return o[:, 0].to(v.dtype)
