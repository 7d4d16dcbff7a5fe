"""The definition: the online scaled delta rule token by token, in float64, under plain autograd.

This file is the paper (arXiv 2605.13473, in the notation of docs/explanation/operator.md) and the
truth that every other backend is tested against. Per batch element and head, with s_t = k_t ⊙ k_t:

    S̃_t     = α_t S_{t−1}                                 decay, α_t = exp(log_alpha), else 1
    e_t     = v_t − S̃_tᵀ k_t                              residual
    S_t     = S̃_t + β_t (d_t ⊙ k_t) e_tᵀ                  preconditioned gradient step
    o_t     = scale · S_tᵀ q_t                            read
    x_t     = 1 − b_t ⟨d_t, s_t⟩                          b_t = β_t if beta_aware else 1
    d_{t+1} = clip(γ_t d_t + η b_t x_t s_t, d_min, d_max) hypergradient step, with forgetting γ_t
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from osdn.ops.operands import Operands, Options, Token


def write(
    S: Tensor, d: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor | None = None
) -> Tensor:
    """The memory after one token. S [..., K, V], d, k [..., K], v [..., V], beta, log_alpha [...].

    Decay first, then erase and write: the residual is that of the decayed memory.
    """
    S = S if log_alpha is None else log_alpha.exp()[..., None, None] * S
    e = v - torch.einsum("...kv,...k->...v", S, k)  # what the memory gets wrong, [..., V]
    # The write key is d ⊙ k, the read key k alone.
    return S + beta[..., None, None] * (d * k)[..., :, None] * e[..., None, :]


def adapt(d: Tensor, k: Tensor, beta: Tensor, log_gamma: Tensor | None, options: Options) -> Tensor:
    """The preconditioner after one token. d and k [..., K], beta and log_gamma [...]."""
    s = k * k  # [..., K]
    b = beta if options.beta_aware else torch.ones_like(beta)
    x = 1 - b * (d * s).sum(-1)  # what is left of the residual, [...]
    decayed = d if log_gamma is None else log_gamma.exp()[..., None] * d
    # Forgetting first, then the hypergradient step, the clip last: every token has all three.
    u = decayed + options.eta * (b * x)[..., None] * s
    return u if options.precond_min is None else u.clamp(options.precond_min, options.precond_max)


def forward(operands: Operands, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final_state, final_precond): the recurrence over every sequence, computed in float64.

    o has v's dtype, the final states are float64.
    """
    x = _in_float64(operands)
    # A pack is its sequences one by one; that is what packing must equal.
    if x.cu_seqlens is None:
        o, S, d = _scan(x, options)
    else:
        runs = [
            _scan(_sequence(x, n, start, end), options)
            for n, (start, end) in enumerate(pairwise(x.cu_seqlens.tolist()))
        ]
        # o along time, states along the sequences.
        o, S, d = (torch.cat(parts, dim) for parts, dim in zip(zip(*runs), (1, 0, 0)))
    return o.to(operands.v.dtype), S, d


def _in_float64(operands: Operands) -> Operands:
    doubles: list[Any] = [None if x is None else x.double() for x in operands[:-1]]
    return Operands._make([*doubles, operands.cu_seqlens])


def _sequence(x: Operands, n: int, start: int, end: int) -> Operands:
    """Sequence n of a pack, which has the tokens [start, end), by itself."""
    tokens: list[Any] = [None if y is None else y[:, start:end] for y in x[:6]]
    states = x.initial_state[n : n + 1], x.initial_precond[n : n + 1]
    return Operands._make([*tokens, *states, None])


def _scan(x: Operands, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over [B, T, H, ...]: (o [B, T, H, V], S [B, H, K, V], d [B, H, K])."""
    S, d, T, outputs = x.initial_state, x.initial_precond, x.q.shape[1], []
    by_token = zip(*([None] * T if y is None else y.unbind(1) for y in x[:6]))
    # The write takes d from before the token, so it comes before d moves.
    for q, k, v, beta, log_gamma, log_alpha in by_token:
        S = write(S, d, k, v, beta, log_alpha)
        d = adapt(d, k, beta, log_gamma, options)
        outputs.append(options.scale * torch.einsum("...kv,...k->...v", S, q))
    return torch.stack(outputs, 1), S, d


def step(token: Token, options: Options) -> Tensor:
    """One token: updates state [B, H, K, V] and precond [B, H, K] in place, returns o [B, H, V]."""
    tokens: list[Any] = [None if x is None else x[:, None] for x in token[:6]]
    operands = Operands._make([*tokens, token.state, token.precond, None])
    o, S, d = _scan(_in_float64(operands), options)
    token.state.copy_(S)
    token.precond.copy_(d)
    return o[:, 0].to(token.v.dtype)
