"""The `numba` backend: the token recurrence compiled for the CPU, heads over threads.

The loops and what they compute are in compiled_forward.py and compiled_backward.py; the contract of
the four functions is in osdn.ops.registration. float32 and float64 are computed as they are, other
dtypes in float32. Of all that the forward computes, the residual e [B, T, H, V] alone is saved.

PyTorch's operations are left out where the dtype is the accumulation dtype: one over enough
elements (2,048 for exp, 32,768 for a copy) wakes PyTorch's OpenMP threads, which go on spinning for
milliseconds on the cores that the threads here want.

Threads: as many as torch.get_num_threads() says, from a pool of Python threads (the machine code
releases the GIL). numba's prange is not used: where neither TBB nor a system OpenMP is found, it
falls back to a pool that ends the process when two threads call it at once.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from osdn.ops.numba import backward as compiled_backward
from osdn.ops.numba import forward as compiled_forward
from osdn.ops.operands import Operands, Options, Token
from osdn.ops.packing import check_cu_seqlens

WORTH_A_THREAD = 1 << 19  # elements of S visited (tokens × heads × K × V): about 30 µs of work
_pools: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)


def forward(
    operands: Operands, options: Options, save: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(o, final_state, final_precond, [e]): the recurrence over every sequence."""
    q, k, v, beta, log_gamma, _, initial_state, initial_precond, cu_seqlens = operands
    saved = saved_like(operands, options, save)
    o = v.new_empty(v.shape, dtype=beta.dtype)
    final_state, final_precond = _copied(initial_state), _copied(initial_precond)
    _forward(q, k, v, beta, log_gamma, cu_seqlens, options, (o, *saved, final_state, final_precond))
    return o.to(v.dtype), final_state, final_precond, saved


def saved_like(operands: Operands, options: Options, save: bool) -> list[Tensor]:
    """[e]: the residuals [B, T, H, V] in the accumulation dtype; of size 0 unless save."""
    return [operands.beta.new_empty(operands.v.shape if save else 0)]


def backward(
    do: Tensor,
    dfinal_state: Tensor,
    dfinal_precond: Tensor,
    operands: Operands,
    saved: list[Tensor],
    options: Options,
) -> list[Tensor]:
    """The gradients of operands.differentiable(), in its order."""
    q, k, v, beta, log_gamma, _, initial_state, initial_precond, cu_seqlens = operands
    log_gammas = beta.new_empty(0) if log_gamma is None else log_gamma
    given = (do, q, k, beta, log_gammas, initial_state, initial_precond)
    out = [x.new_empty(x.shape, dtype=beta.dtype) for x in (q, k, v, beta, log_gammas)]
    dq, dk, dv, dbeta, dlog_gamma = out
    dstate, dprecond = _copied(dfinal_state), _copied(dfinal_precond)
    out += [dstate, dprecond]
    moves = not options.constant_precond(log_gamma is not None)
    arrays = tuple(_flat(beta.dtype, *given, *saved)), tuple(_flat(beta.dtype, *out))
    _run(
        compiled_backward.backward, v, k.shape[-1], cu_seqlens, (_numbers(options, moves), *arrays)
    )
    gates = [dbeta] if log_gamma is None else [dbeta, dlog_gamma]
    return [dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *gates, dstate, dprecond]


def step(token: Token, options: Options) -> Tensor:
    """o [B, H, V] for one token; state [B, H, K, V] and precond [B, H, K] change in place."""
    q, k, v, beta, log_gamma, _, state, precond, _ = token
    o = v.new_empty(v.shape, dtype=beta.dtype)
    out = (o, beta.new_empty(0), state, precond)
    _forward(q, k, v[:, None], beta, log_gamma, None, options, out)
    torch.autograd.graph.increment_version((state, precond))  # numpy wrote to them, unseen
    return o.to(v.dtype)


def _forward(q, k, v, beta, log_gamma, cu_seqlens, options: Options, out) -> None:
    """Fill out = (o, e, state, precond), of which the last two hold the start."""
    moves = not options.constant_precond(log_gamma is not None)
    log_gamma = beta.new_empty(0) if log_gamma is None else log_gamma
    given = _flat(beta.dtype, q, k, v, beta, log_gamma)
    arguments = (_numbers(options, moves), tuple(given), tuple(_flat(beta.dtype, *out)))
    _run(compiled_forward.forward, v, k.shape[-1], cu_seqlens, arguments)


def _copied(x: Tensor) -> Tensor:
    """A contiguous copy, made by this thread."""
    copy = x.new_empty(x.shape)
    np.copyto(copy.numpy(), x.detach().numpy())
    return copy


def _flat(dtype: torch.dtype, *tensors: Tensor) -> list[ndarray]:
    """Views, or copies where the dtype or the layout asks for one."""
    flat = []
    for x in tensors:
        x = x.detach() if x.dtype == dtype else x.detach().to(dtype)
        x = x if x.is_contiguous() else x.contiguous()
        flat.append(x.numpy().reshape(-1))
    return flat


def _numbers(options: Options, moves: bool) -> tuple[float, bool, float, float, float, bool]:
    """The options as the kernels take them; no box is an infinite one, which changes nothing."""
    low = -math.inf if options.precond_min is None else float(options.precond_min)
    high = math.inf if options.precond_max is None else float(options.precond_max)
    return float(options.eta), options.beta_aware, low, high, float(options.scale), moves


def _run(kernel: Callable, v: Tensor, K: int, cu_seqlens: Tensor | None, arguments: tuple) -> None:
    """kernel(jobs, bounds, sizes, *arguments) for all jobs, in parts over the threads."""
    B, T, H, V = v.shape
    if cu_seqlens is None:
        bounds = np.arange(B + 1) * T
    else:
        check_cu_seqlens(cu_seqlens, v)  # under torch.compile nobody has; wrong ones would crash
        bounds = cu_seqlens.to(torch.int64).numpy()
    jobs = (len(bounds) - 1) * H
    threads = min(torch.get_num_threads(), jobs, B * T * H * K * V // WORTH_A_THREAD)
    if threads <= 1:
        kernel((0, jobs), bounds, (H, K, V), *arguments)
        return
    parts = min(jobs, 2 * threads)
    edges = [jobs * part // parts for part in range(parts + 1)]
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads, "osdn")
    run = [
        _pools[threads].submit(kernel, edge, bounds, (H, K, V), *arguments)
        for edge in pairwise(edges)
    ]
    for part in run:
        part.result()
