"""The `numba` backend: the token recurrence compiled for the CPU, heads over threads.

The loops are in walk.py and step.py, what they compute in precond.py and memory.py; the contract of
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
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from osdn.ops.numba import walk
from osdn.ops.numba.step import step as compiled_step
from osdn.ops.operands import Operands, Options, Token
from osdn.ops.packing import check_cu_seqlens

WORTH_A_THREAD = 1 << 19  # elements of S visited (tokens × heads × K × V): about 30 µs of work
_pools: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    # A forked child has the pools' objects but none of their threads: it would wait for ever.
    os.register_at_fork(after_in_child=_pools.clear)


def forward(
    operands: Operands, options: Options, save: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(o, final_state, final_precond, [e]): the recurrence over every sequence."""
    q, k, v, beta, log_gamma, log_alpha, initial_state, initial_precond, _ = operands
    saved = saved_like(operands, options, save)
    o = v.new_empty(v.shape, dtype=operands.dtype)
    final_state, final_precond = _copied(initial_state), _copied(initial_precond)
    # The order is the one that walk.forward unpacks; absent tensors are arrays of size 0.
    given = _flat(operands.dtype, q, k, v, beta, log_gamma, decay=log_alpha)
    # Written in place: the kernels start from the initial states and leave the final ones.
    out = _flat(operands.dtype, o, *saved, final_state, final_precond)
    _walk(walk.forward, operands, (_numbers(options, log_gamma), given, out))
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
    q, k, v, beta, log_gamma, log_alpha, initial_state, initial_precond, _ = operands
    dtype, (e,) = operands.dtype, saved
    dq, dk, dv, dbeta = (x.new_empty(x.shape, dtype=dtype) for x in (q, k, v, beta))
    dlog_gamma, dlog_alpha = (
        None if x is None else x.new_empty(x.shape) for x in (log_gamma, log_alpha)
    )
    dstate, dprecond = _copied(dfinal_state), _copied(dfinal_precond)
    # v and dS are read for log α's gradient only: without it they need not be copied.
    only_with_decay = (None, None) if log_alpha is None else (v, dfinal_state)
    given = _flat(dtype, do, q, k, only_with_decay[0], beta, log_gamma, decay=log_alpha)
    given += _flat(dtype, initial_state, initial_precond, e, only_with_decay[1])
    out = _flat(dtype, dq, dk, dv, dbeta, dlog_gamma, decay=dlog_alpha)
    out += _flat(dtype, dstate, dprecond)
    _walk(walk.backward, operands, (_numbers(options, log_gamma), given, out))
    # The gates' gradients are in the accumulation dtype already, as the gates are.
    tokens = dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbeta, dlog_gamma, dlog_alpha
    return [*(x for x in tokens if x is not None), dstate, dprecond]


def step(token: Token, options: Options) -> Tensor:
    """o [B, H, V] for one token; state [P, H, K, V] and precond [P, H, K] change in place."""
    q, k, v, beta, log_gamma, log_alpha, state, precond, *_ = token
    (B, H, V), K, dtype = v.shape, k.shape[-1], state.dtype
    # Row i in place i; else wherever the pool keeps it.
    if token.slots is None:
        read = write = np.arange(B)
        o = v.new_empty(v.shape, dtype=dtype)
    else:
        read, write = (places.numpy() for places in token.places())
        o = v.new_zeros(v.shape, dtype=dtype)  # an empty row leaves it so
    given = _flat(dtype, q, k, v, beta, log_gamma, decay=log_alpha)
    out = *_flat(dtype, o), _pool(state), _pool(precond)
    places = read, write, state.stride(0), precond.stride(0)
    arguments = ((H, K, V), _numbers(options, log_gamma), given, out, places)
    _run(compiled_step, B * H, B * H * K * V, arguments)
    torch.autograd.graph.increment_version((state, precond))  # numpy wrote to them, unseen
    return o.to(v.dtype)


def _copied(x: Tensor) -> Tensor:
    """A contiguous copy, made by this thread."""
    # NumPy's copy, not PyTorch's: see the module on OpenMP threads.
    copy = x.new_empty(x.shape)
    np.copyto(copy.numpy(), x.detach().numpy())
    return copy


_NOT_GIVEN = object()


def _flat(dtype: torch.dtype, *tensors: Tensor | None, decay: object = _NOT_GIVEN) -> tuple:
    """Flat views, or copies where the dtype or the layout asks for one; None is of size 0.

    `decay` comes last and stays None where it is: numba then compiles the kernels without it.
    """
    flat: list[ndarray | None] = [_array(x, dtype) for x in tensors]
    if decay is None:
        flat.append(None)
    elif isinstance(decay, Tensor):
        flat.append(_array(decay, dtype))
    return tuple(flat)


def _array(x: Tensor | None, dtype: torch.dtype) -> ndarray:
    if x is None:
        return torch.empty(0, dtype=dtype, device="cpu").numpy()
    x = x.detach() if x.dtype == dtype else x.detach().to(dtype)
    return (x if x.is_contiguous() else x.contiguous()).numpy().reshape(-1)


def _pool(x: Tensor) -> ndarray:
    """A flat view of all that a pool [P, ...] spans, with whatever lies between its places."""
    x = x.detach()
    if x.is_contiguous():
        return x.numpy().reshape(-1)
    row = x[0].numel()
    # Without the gap after the last place, which may lie outside of the storage.
    return x.as_strided(((len(x) - 1) * x.stride(0) + row,), (1,)).numpy()


def _numbers(
    options: Options, log_gamma: Tensor | None
) -> tuple[float, bool, float, float, float, bool]:
    """The options as the kernels take them; no box is an infinite one, which changes nothing."""
    low = -math.inf if options.precond_min is None else float(options.precond_min)
    high = math.inf if options.precond_max is None else float(options.precond_max)
    moves = not options.constant_precond(log_gamma is not None)
    return float(options.eta), options.beta_aware, low, high, float(options.scale), moves


def _walk(kernel: Callable, operands: Operands, arguments: tuple) -> None:
    """kernel(jobs, bounds, sizes, *arguments) for all heads of all sequences."""
    (B, T, H, V), K, cu_seqlens = operands.v.shape, operands.k.shape[-1], operands.cu_seqlens
    if cu_seqlens is None:
        # A batch is a pack of equal sequences.
        bounds = np.arange(B + 1) * T
    else:
        # Under torch.compile nobody has checked them; wrong ones would crash.
        check_cu_seqlens(cu_seqlens, operands.v)
        bounds = cu_seqlens.to(torch.int64).numpy()
    # Heads are independent, so they are what threads share.
    jobs = (len(bounds) - 1) * H
    _run(kernel, jobs, B * T * H * K * V, (bounds, (H, K, V), *arguments))


def _run(kernel: Callable, jobs: int, work: int, arguments: tuple) -> None:
    """kernel(jobs, *arguments) for all jobs, in parts over the threads."""
    threads = min(torch.get_num_threads(), jobs, work // WORTH_A_THREAD)
    # Once the main thread has ended Python starts no threads, nor gives a pool anything to do.
    if threads <= 1 or not threading.main_thread().is_alive():
        kernel((0, jobs), *arguments)
        return
    # Two parts a thread: sequences differ in length, and the second part evens it out.
    parts = min(jobs, 2 * threads)
    edges = [jobs * part // parts for part in range(parts + 1)]
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads, "osdn")
    run = [_pools[threads].submit(kernel, edge, *arguments) for edge in pairwise(edges)]
    for part in run:
        part.result()  # waits, and raises what the kernel raised
