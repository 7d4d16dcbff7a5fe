"""The online scaled delta rule on a GPU, in Triton: the backend "triton" of osdn.ops.interface.

Phase 1 makes the preconditioner's path from the keys alone: in chunks (`precond_forward`,
`precond_backward`), and token by token from where a box clips it (`precond_tokens`,
`precond_clipped`). `write_keys` turns it into the operands of phase 2, which walks the memory
(`memory_forward`, `memory_backward`, `memory_gradients`). `decode` is one token.
docs/explanation/kernels.md says what each kernel reads, writes and costs.
"""

import torch
from torch import Tensor

from osdn.ops.operands import Operands, Options, Token
from osdn.ops.triton.chunks import CHUNK, Chunks, chunk_bound, cut, on_device, span_bound
from osdn.ops.triton.gates import Decay
from osdn.ops.triton.memory_backward import memory_reverse
from osdn.ops.triton.memory_forward import memory, transitions_like
from osdn.ops.triton.memory_gradients import gradients
from osdn.ops.triton.precond_backward import chunk_scan_reverse
from osdn.ops.triton.precond_clipped import clipped_gradients, clipped_keys, inside_like
from osdn.ops.triton.precond_forward import chunk_scan, inverse_like
from osdn.ops.triton.precond_segments import transfers_like
from osdn.ops.triton.precond_tokens import token_scan
from osdn.ops.triton.precond_tokens_backward import token_scan_reverse
from osdn.ops.triton.step import decode
from osdn.ops.triton.write_keys import write_keys


def forward(
    operands: Operands, options: Options, save: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(o, final_state, final_precond, saved); the contract is osdn.ops.registration's."""
    q, k, v, beta, log_gamma, log_alpha, initial_state, initial_precond, cu_seqlens = operands
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    with on_device(q):
        chunks = cut(q.shape[0], q.shape[1], cu_seqlens)
        # x: phase 1's solution; starts: d at chunk starts; w [B, T, H, K]; A: phase 2's solve.
        x, starts, w, A, clipped, inside, *pair = _intermediates(operands, options)
        memory_decay = Decay(*pair)
        e, kept, reads = _residuals(operands) if save else (None, None, None)
        gates = (k, beta, log_gamma)
        if cu_seqlens is not None:
            starts.zero_()  # those past the last chunk are never written
        # With d constant (η = 0, no γ) there is no phase 1.
        if options.constant_precond(log_gamma is not None):
            precond = initial_precond.clone()
            starts.copy_(_at_chunks(initial_precond, chunks))
            x.zero_()
            inverse, M = _solve_like(k, cu_seqlens, constant=True)
        else:
            precond, inverse, M = chunk_scan(*gates, initial_precond, x, starts, chunks, options)
        if options.precond_min is not None:
            # With a box w is made first: as if it clipped nothing, and again from where it does,
            # if anywhere; where not, both kernels return at once.
            boxed_gates = (k, beta, None if log_gamma is None else log_gamma.exp())
            path = (*boxed_gates, x, starts, w, inside, clipped, chunks, options)
            clipped_keys(*path, found=False)
            token_scan(*boxed_gates, x, starts, precond, clipped, chunks, options)
            clipped_keys(*path, found=True)
        write_keys(k, beta, log_gamma, log_alpha, x, starts, w, A, memory_decay, chunks, options)
        given = None if log_alpha is None else memory_decay
        o, state, transitions = memory(
            q, k, w, v, A, given, initial_state, e, kept, reads, chunks, options
        )
    if e is None or kept is None or reads is None:
        return o, state, precond, []
    saved = [x, starts, w, A, clipped, inside, *memory_decay, e, kept, reads]
    saved += [inverse, M, transitions]
    return o, state, precond, saved


def saved_like(operands: Operands, options: Options, save: bool) -> list[Tensor]:
    """Empty: `_intermediates`, `_residuals`, phase 1's solve, the segments' maps of the memory."""
    if not save:
        return []
    q, k, v, _, log_gamma, *_, cu_seqlens = operands
    made = _intermediates(operands, options)
    solve = _solve_like(k, cu_seqlens, options.constant_precond(log_gamma is not None))
    return [*made, *_residuals(operands), *solve, transitions_like(q, v, cu_seqlens)]


def _residuals(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Empty e [B, T, H, V]; kept [spans, H, V, K]: Sᵀ at the start of every span; `memory`'s reads
    [B, T, H, CHUNK], of no size without log_alpha.
    """
    k, v, cu_seqlens = operands.k, operands.v, operands.cu_seqlens
    B, T, H, K = k.shape
    kept = k.new_empty(span_bound(B, T, cu_seqlens), H, v.shape[-1], K)
    decaying = 0 if operands.log_alpha is None else T
    return v.new_empty(v.shape), kept, k.new_empty(B, decaying, H, CHUNK)


def _solve_like(k: Tensor, cu_seqlens: Tensor | None, constant: bool) -> tuple[Tensor, Tensor]:
    """Empty inverse and M of `precond_forward`, of no size where d is constant."""
    if constant:
        H, K = k.shape[2:]
        return inverse_like(k[:0]), k.new_empty(0, H, K, K, dtype=torch.float32)
    return inverse_like(k), transfers_like(k, cu_seqlens)


def _intermediates(operands: Operands, options: Options) -> list[Tensor]:
    """Empty x [B, T, H], d [chunks, H, K], w [B, T, H, K], A [B, T, H, CHUNK],
    clipped [N, H] int32: with a box, the number of the first chunk where d left it, or the bound;
    `inside_like`; the two tensors of `Decay`, of no size without log_alpha.
    """
    k, beta, precond, cu_seqlens = operands.k, operands.beta, operands.initial_precond, operands[-1]
    B, T, H, K = k.shape
    decaying = 0 if operands.log_alpha is None else T
    bound = chunk_bound(B, T, cu_seqlens)
    return [
        beta.new_empty(beta.shape),
        beta.new_empty(bound, H, K),
        k.new_empty(k.shape),
        k.new_empty(B, T, H, CHUNK),
        precond.new_empty(precond.shape[:2], dtype=torch.int32),
        inside_like(k, bound, options.precond_min is not None),
        k.new_empty(B, decaying, H, CHUNK),
        beta.new_empty(B, decaying, H, 2),
    ]


def backward(
    do: Tensor,
    dfinal_state: Tensor,
    dfinal_precond: Tensor,
    operands: Operands,
    saved: list[Tensor],
    options: Options,
) -> list[Tensor]:
    """The gradients of operands.differentiable(), in its order."""
    q, k, _, beta, log_gamma, log_alpha, _, _, cu_seqlens = operands
    x, starts, w, A, clipped, inside, *pair, e, kept, reads, inverse, M, transitions = saved
    decay = None if log_alpha is None else Decay(*pair)
    q, k, do = q.contiguous(), k.contiguous(), do.contiguous()
    dfinal_state, dfinal_precond = dfinal_state.contiguous(), dfinal_precond.contiguous()
    with on_device(q):
        chunks = cut(q.shape[0], q.shape[1], cu_seqlens)
        # Phase 2 first: phase 1's gradient begins with dw, that of the write keys.
        dv, dw, dstate, parts = memory_reverse(
            q, k, w, A, decay, e, do, dfinal_state, transitions, reads, chunks, options
        )
        dq, dk, dlog_alpha = gradients(
            q, k, w, log_alpha, decay, e, do, dv, kept, parts, chunks, options
        )
        gates = (k, beta, log_gamma)
        # The scans below fill these, and add phase 1's part to dk.
        dbeta = torch.empty_like(beta)
        dlog_gamma = None if log_gamma is None else torch.empty_like(beta)
        found = (dk, dbeta, dlog_gamma)
        if options.precond_min is not None:
            gs, ends = torch.empty_like(beta), torch.empty_like(starts)
            boxed_gates = (k, beta, None if log_gamma is None else log_gamma.exp())
            dfinal_precond = token_scan_reverse(
                *boxed_gates, dw, inside, dfinal_precond, gs, ends, clipped, chunks, options
            )
            path = (*boxed_gates, x, starts, inside)
            clipped_gradients(*path, dw, gs, ends, *found, clipped, chunks, options)
        dprecond = chunk_scan_reverse(
            *gates, x, starts, inverse, M, dw, dfinal_precond, *found, clipped, chunks, options
        )
    gates_given = [x for x in (dbeta, dlog_gamma, dlog_alpha) if x is not None]
    return [dq, dk, dv, *gates_given, dstate, dprecond]


def step(token: Token, options: Options) -> Tensor:
    """o [B, H, V]; state and precond are updated in place."""
    token = token._replace(q=token.q.contiguous(), k=token.k.contiguous(), v=token.v.contiguous())
    with on_device(token.q):
        return decode(token, options)


def _at_chunks(precond: Tensor, chunks: Chunks) -> Tensor:
    """precond [N, H, K] at every chunk's start, where it does not move."""
    if chunks.indices is not None:
        return precond[chunks.indices[:, 0].clamp(min=0)]
    return precond.repeat_interleave(chunks.bound // chunks.sequences, 0)
