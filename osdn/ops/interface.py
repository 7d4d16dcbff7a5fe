"""The front door of the operator: documentation, validation and the choice of a backend."""

import os
from importlib.util import find_spec
from typing import Any, overload

import torch
from torch import Tensor

from osdn.ops import reference
from osdn.ops.operands import Operands, Options, Token
from osdn.ops.registration import dispatched, register
from osdn.ops.validation import (
    check_kinds,
    check_reverse_mode,
    check_rule,
    check_shapes,
    check_step_shapes,
    check_tensors,
)

# Modules are named and not imported: numba and Triton cost nothing until they are used.
BACKENDS = {
    "chunkwise": register("chunkwise", "osdn.ops.chunkwise"),
    "numba": register("numba", "osdn.ops.numba"),
    "triton": register("triton", "osdn.ops.triton"),
}
HAS_NUMBA = find_spec("numba") is not None
HAS_TRITON = find_spec("triton") is not None
TRITON_LARGEST_HEAD = 256
TAKE_POOLS = ("numba", "triton")  # whose steps work on pools where these lie


def online_scaled_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None = None,
    *,
    log_alpha: Tensor | None = None,
    eta: float = 1.0,
    beta_aware: bool = False,
    precond_min: float | None = None,
    precond_max: float | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    initial_precond: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The online scaled delta rule over whole sequences, differentiable in every tensor.

    For t = 1..T, with s_t = k_t ⊙ k_t, memory S (K×V) and preconditioner d (K):

        S̃_t     = α_t S_{t−1}                                   α_t = exp(log_alpha), else 1
        e_t     = v_t − S̃_tᵀ k_t
        S_t     = S̃_t + β_t (d_t ⊙ k_t) e_tᵀ
        o_t     = scale · S_tᵀ q_t
        x_t     = 1 − b_t ⟨d_t, s_t⟩                            b_t = β_t if beta_aware else 1
        d_{t+1} = clip(γ_t d_t + η b_t x_t s_t, precond_min, precond_max)

    With eta=0, no log_gamma and no box, d stays initial_precond: the plain delta rule, or with
    log_alpha the gated one (Gated DeltaNet).

    Args:
        q, k: [B, T, H, K] queries and keys, of one floating dtype. k is used as given: normalise
            it yourself (the layer does); unit keys are what the theory and the defaults assume.
        v: [B, T, H, V] values, same dtype. Under autocast q, k and v are cast to its dtype.
        beta: [B, T, H] write strength β_t in [0, 2], any floating dtype.
        log_gamma: [B, T, H] log of the preconditioner's retention γ_t, ≤ 0 (APF); None: γ = 1.
        log_alpha: [B, T, H] log of the memory's retention α_t, ≤ 0 (state decay); None: α = 1.
            −∞ is α = 0, a hard reset.
        eta: step size η of the hypergradient descent, in [0, 2].
        beta_aware: let the hypergradient see the step's own β_t.
        precond_min, precond_max: the box d is clipped to after each token; both or neither.
            With unit keys and β ≤ 1 the box [0, 2] makes every erase a contraction.
        scale: factor on the reads; None means K^-0.5.
        initial_state: [N, H, K, V] memory to start from (N = B, or the number of sequences in
            cu_seqlens); None means zeros.
        initial_precond: [N, H, K], or [H, K] for all sequences; None means ones.
        output_final_state: also return the memory and the preconditioner after the last token.
        cu_seqlens: [N + 1] int32 or int64 offsets of sequences packed along T; B must be 1.
            0 = cu_seqlens[0] < ... < cu_seqlens[N] = T. On a GPU looked at once, until it is
            changed in place; not under torch.compile, nor while a CUDA graph is captured or
            replayed.
        backend: "auto" (triton for CUDA tensors of at most 32 bits with K and V ≤ 256, numba for
            CPU tensors where it is installed, else chunkwise), "reference", "chunkwise", "numba" or
            "triton".

    Returns:
        o: [B, T, H, V] in v's dtype; final_state: [N, H, K, V] and final_precond: [N, H, K] in
        float32 (float64 for float64 input and in the reference), or None and None.

    Padding: a token with k = 0, beta = 0, log_gamma = 0 and log_alpha = 0 changes neither S nor d
    (its clip moves a d that starts outside the box, as any token's does).

    A NaN or an infinity in a token reaches the later tokens of its head. With chunkwise and triton
    it also reaches the earlier ones of its chunk of up to 32 and 64 tokens: 0 times NaN is NaN in
    their products. A log γ or log α of −∞ is no such infinity: it is γ = 0 or α = 0.

    Second derivatives, forward mode and torch.func are an error but with the reference.

    Raises:
        ValueError: a wrong shape, dtype, device, option or backend; the message names the
            argument, what was expected and what came.

    Source: arXiv 2605.13473; the delta rule in chunks is arXiv 2406.06484, the gated one
    arXiv 2412.06464.
    """
    # Checks first, in the order of what each needs: kinds, then devices, then shapes.
    optional = {"log_gamma": log_gamma, "log_alpha": log_alpha, "initial_state": initial_state,
                "initial_precond": initial_precond}  # fmt: skip
    check_kinds({"q": q, "k": k, "v": v, "beta": beta}, optional, scale)
    q, k, v = _autocast(q, k, v)
    check_tensors(q=q, k=k, v=v, beta=beta, **optional)
    operands = Operands._make(  # as given; the states may be absent yet
        (q, k, v, beta, log_gamma, log_alpha, initial_state, initial_precond, cu_seqlens)
    )
    sequences = check_shapes(operands)
    check_rule(eta, precond_min, precond_max, beta_aware)
    backend = _choose(backend, q, v)
    # The reference is plain PyTorch, and takes every kind of derivative.
    check_reverse_mode(backend, q=q, k=k, v=v, beta=beta, **optional)

    (H, K), V = q.shape[2:], v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    options = Options(eta, beta_aware, precond_min, precond_max, scale)
    # States are wider than tokens: they sum over thousands of them.
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    # Defaults become tensors here, so that no backend has a case for None.
    if initial_state is None:
        initial_state = q.new_zeros(sequences, H, K, V, dtype=accumulate)
    if initial_precond is None:
        initial_precond = q.new_ones(sequences, H, K, dtype=accumulate)
    # A d_1 [H, K] is shared by all sequences; its gradient is the sum over them.
    initial_precond = initial_precond.expand(sequences, H, K)

    operands = operands._replace(initial_state=initial_state, initial_precond=initial_precond)
    # Takes everything as it is, in any dtype, and computes in float64.
    if backend == "reference":
        o, state, precond = reference.forward(operands, options)
    else:
        # Backends get gates and states contiguous, in the accumulation dtype; q, k, v as they are.
        cast: list[Any] = [_cast(x, accumulate) for x in operands[3:8]]
        operands = Operands._make([q, k, v, *cast, cu_seqlens])
        # Decided here: inside a custom operator grad mode is off, and nobody could tell.
        save = torch.is_grad_enabled() and any(x.requires_grad for x in operands.differentiable())
        # The dispatcher costs more than a small call; it is gone through only if someone looks.
        run = BACKENDS[backend].rule if dispatched(q) else BACKENDS[backend].eager_rule
        o, state, precond = run(*operands, *options, save)[:3]
    return (o, state, precond) if output_final_state else (o, None, None)


def online_scaled_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None = None,
    *,
    log_alpha: Tensor | None = None,
    state: Tensor,
    precond: Tensor,
    eta: float = 1.0,
    beta_aware: bool = False,
    precond_min: float | None = None,
    precond_max: float | None = None,
    scale: float | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """One token of `online_scaled_delta_rule`, for decoding: constant time and memory per token.

    Args:
        q, k: [B, H, K].  v: [B, H, V].  beta, log_gamma, log_alpha: [B, H]; None means γ = 1 and
            α = 1.
        state: [B, H, K, V], as the rule returned it: float32 (float64 for float64 input and in the
            reference); updated in place. Its first dimension may have any stride.
        precond: [B, H, K], likewise.
        slots: [B] int32 or int64, where sequence i keeps its memory in a pool: state [P, H, K, V]
            and precond [P, H, K] are read and written at slots[i], and nowhere else. Distinct and
            less than P (not checked on a GPU). Negative: the row is empty, as any number of rows
            may be; nothing is written for it and its o has no meaning. None: sequence i is at i.
        write_slots: [B] like slots: sequence i reads slots[i] and writes write_slots[i]. Several
            rows may read one place, if no other row writes it. None: the same as slots.
        eta, beta_aware, precond_min, precond_max, scale, backend: as in the rule.

    Returns:
        (o, state, precond): o is [B, H, V] in v's dtype; state and precond are the same tensors
        that were given, now after this token. Not differentiable: train with the rule.

    Raises:
        ValueError: as the rule does, and where a gradient would be needed.
    """
    # As the rule, but for the states: they are written to, so they must be as they will be kept.
    required = {"q": q, "k": k, "v": v, "beta": beta, "state": state, "precond": precond}
    gates = {"log_gamma": log_gamma, "log_alpha": log_alpha}
    check_kinds(required, gates, scale)
    q, k, v = _autocast(q, k, v)
    check_tensors(q=q, k=k, v=v, beta=beta, state=state, precond=precond, **gates)
    token = Token(q, k, v, beta, log_gamma, log_alpha, state, precond, slots, write_slots)
    check_step_shapes(token)
    check_rule(eta, precond_min, precond_max, beta_aware)
    backend = _choose(backend, q, v)
    check_reverse_mode(backend, **required, **gates)
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    # A copy made here would take the writes, and the caller's tensor would stay as it was.
    for name, x in (("state", state), ("precond", precond)):
        kept = x.dtype == accumulate or (backend == "reference" and x.dtype == torch.float64)
        # Places of a pool may lie apart, as in vLLM's cache, but not on top of each other.
        apart = len(x) == 1 or x.stride(0) >= x[0].numel()
        if not kept or not x[0].is_contiguous() or not apart:
            raise ValueError(
                f"{name}: expected a {accumulate} tensor whose places along dimension 0 are each "
                f"contiguous and do not overlap, got {x.dtype} with strides {x.stride()}; keep it "
                "as the rule returned it"
            )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in token):
        raise ValueError(
            "online_scaled_delta_step: expected tensors that need no gradient, since it works in "
            "place; call it under torch.no_grad(), or use online_scaled_delta_rule to train"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _step(backend, token, Options(eta, beta_aware, precond_min, precond_max, scale))


def _step(backend: str, token: Token, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The step by a backend; on copies of the places in use where its own knows no pools."""
    state, precond = token.state, token.precond
    as_the_rule_returned = token.slots is None and state.is_contiguous() and precond.is_contiguous()
    if backend not in TAKE_POOLS and not as_the_rule_returned:
        # Gather the rows in use, step, scatter: for the backends that know no pools.
        read, write = token.places()
        used = (read >= 0) & (write >= 0)  # [B]
        read, write, o = read[used], write[used], torch.zeros_like(token.v)
        rows: list[Any] = [None if x is None else x[used] for x in token[:6]]
        copied = Token._make([*rows, state[read], precond[read], None, None])
        o[used], state[write], precond[write] = _step(backend, copied, options)
        return o, state, precond
    if backend == "reference":
        return reference.step(token, options), state, precond
    accumulate = torch.float64 if token.q.dtype == torch.float64 else torch.float32
    gates = [_cast(x, accumulate) for x in token[3:6]]
    step = BACKENDS[backend].step if dispatched(token.q) else BACKENDS[backend].eager_step
    return step(*token[:3], *gates, *token[6:], *options), state, precond


@overload
def _cast(x: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def _cast(x: None, dtype: torch.dtype) -> None: ...
def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the autocast dtype where autocast is on for their device, else as they are."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    # What autocast itself does to a matrix product's inputs, which a custom operator misses.
    dtype = torch.get_autocast_dtype(device)
    return [
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    ]


def _choose(backend: str, q: Tensor, v: Tensor) -> str:
    if backend == "auto":
        # A GPU has chunkwise for what the kernels cannot do; asked for by name they raise.
        if q.is_cuda and not _triton_lacks(q, v):
            return "triton"
        return "numba" if HAS_NUMBA and q.device.type == "cpu" else "chunkwise"
    if backend not in ("reference", *BACKENDS):
        names = ", ".join(repr(x) for x in ("auto", "reference", *BACKENDS))
        raise ValueError(f"backend: expected one of {names}, got {backend!r}")
    if backend == "numba" and (not HAS_NUMBA or q.device.type != "cpu"):
        problem = f"tensors on {q.device}" if HAS_NUMBA else "no numba (pip install 'osdn[cpu]')"
        raise ValueError(f"backend: 'numba' needs CPU tensors and numba installed, got {problem}")
    if backend == "triton" and (problem := _triton_lacks(q, v)):
        raise ValueError(f"backend: 'triton' {problem}; use backend='auto' or 'chunkwise'")
    return backend


def _triton_lacks(q: Tensor, v: Tensor) -> str:
    """Why the Triton kernels cannot run on these tensors, or an empty string."""
    if not HAS_TRITON:
        return "needs Triton, which PyTorch's CUDA builds bring and this installation lacks"
    # Read as Triton reads it, so that both agree.
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if not (q.is_cuda or (interpreted and q.device.type == "cpu")):
        return (
            f"compiles for GPUs and needs CUDA tensors, got tensors on {q.device} (with "
            "TRITON_INTERPRET=1 in the environment from the start, CPU tensors do)"
        )
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"needs bfloat16, float16 or float32 tensors, got {q.dtype}"
    if interpreted and q.dtype == torch.bfloat16:
        return (
            "under TRITON_INTERPRET=1 needs float16 or float32 tensors, got torch.bfloat16, whose "
            "products Triton's interpreter gets wrong (it multiplies the bits as integers)"
        )
    if max(q.shape[-1], v.shape[-1]) > TRITON_LARGEST_HEAD:
        return (
            f"needs K and V of at most {TRITON_LARGEST_HEAD}, got K = {q.shape[-1]} and "
            f"V = {v.shape[-1]}"
        )
    return ""
