"""The operator in plain PyTorch, chunk by chunk, on any device, with a hand-written backward.

Sequences are cut into chunks of C tokens (layout.py). Phase 1 (precond.py) finds the preconditioner
d_t for every token, phase 2 (memory.py) the memory with write keys w_t = β_t d_t ⊙ k_t. In the
backward phase 2 comes first; then

    dk += β d dw,  dβ = ⟨dw, d ⊙ k⟩,  and dd = β k dw goes to phase 1's reverse scan.

All of it is in float32 (float64 for float64 input). Work goes group by group of chunks, to stay in
the cache; nothing of size T×T or T×K×V exists, only S at the start of every chunk, T/C × K × V. It
runs in inference mode, which saves 3 to 6% of the time; what is handed out is made before.

The four functions at the end are the contract of osdn.ops.registration. A NaN or an infinity in a
token reaches all tokens of its chunk, the earlier ones too, since products with zeros above the
diagonal do not stop it; in `reference` and `numba` it reaches later tokens only.

Source: arXiv 2605.13473.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from osdn.ops.chunkwise import memory as phase2
from osdn.ops.chunkwise import precond as phase1
from osdn.ops.chunkwise.layout import Layout, layout_of, size_of
from osdn.ops.chunkwise.memory import Kept
from osdn.ops.chunkwise.retention import Decay
from osdn.ops.operands import Operands, Options, Token

# Floats a tensor of a group of chunks: about 25 such tensors live at once.
# On a CPU 25 × 2¹⁷ × 4 bytes = 13 MB, about a last-level cache. Elsewhere launches count.
GROUP_FLOATS = {"cpu": 1 << 17}
GROUP_FLOATS_ELSEWHERE = 1 << 24


class Group(NamedTuple):
    """A range of steps [i, j) and the number of rows of each."""

    i: int
    j: int
    sizes: list[int]


def _groups(layout: Layout, device: torch.device, width: int) -> list[Group]:
    floats = GROUP_FLOATS.get(device.type, GROUP_FLOATS_ELSEWHERE)
    ranges = layout.groups(floats // (layout.C * width))
    return [Group(i, j, layout.sizes(i, j)) for i, j in ranges]


@contextmanager
def _exactly(device: torch.device) -> Iterator[None]:
    """No autograd, no autocast and no tf32 inside: every product in the tensors' own dtype."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if device.type == "cuda":
            with _no_tf32():
                yield
        else:
            yield


@contextmanager
def _no_tf32() -> Iterator[None]:
    """By the setting that the user took: PyTorch refuses to read the other one after that."""
    settings, name = torch.backends.cuda.matmul, "allow_tf32"
    off: bool | str = False
    try:
        before = getattr(settings, name)
    except RuntimeError:  # fp32_precision was set, which PyTorch has from 2.9 on
        name, off = "fp32_precision", "ieee"
        before = getattr(settings, name)
    if before in (False, "ieee", "none"):
        yield
        return
    setattr(settings, name, off)
    try:
        yield
    finally:
        setattr(settings, name, before)


def _pair(layout: Layout, k: Tensor, q: Tensor, i: int, j: int, dtype: torch.dtype) -> Tensor:
    """k above q, [R, 2 C, K]: what both multiply, they multiply in one product."""
    pair = k.new_empty(sum(layout.sizes(i, j)), 2 * layout.C, k.shape[-1], dtype=dtype)
    layout.load_into(pair[:, : layout.C], k, i, j)
    layout.load_into(pair[:, layout.C :], q, i, j)
    return pair


def _hand_out(d: Tensor, sizes: list[int]) -> Tensor:
    """d [N·H, K] for every chunk of a group, where it never moves: [R, 1, K]."""
    return torch.cat([d[:n] for n in sizes]).unsqueeze(1)


def _kept(
    like: Tensor, R: int, C: int, V: int, options: Options, log_gamma: Tensor | None
) -> list[Tensor]:
    """Unwritten, in the dtype of like [N, H, K], what the backward wants of R chunks.

    The tensors of phase2.Kept and, where d moves, path [R, C, K] and x, L and P of phase1.Chunks.
    """
    K = like.shape[-1]
    sizes = [(C, V), (C, C), (K, V)]
    if not options.constant_precond(log_gamma is not None):
        sizes += [(C, K), (1, C), (C, C)] + ([] if log_gamma is None else [(C + 1, C + 1)])
    return [like.new_empty(R, *size) for size in sizes]


def _decay(
    layout: Layout, log_alpha: Tensor | None, i: int, j: int, dtype: torch.dtype
) -> Decay | None:
    """How the memory decays in steps [i, j); None where it does not."""
    return None if log_alpha is None else Decay.of(layout.load(log_alpha, i, j, dtype).exp_())


def _learning_target(k: Tensor, beta: Tensor, options: Options, out: Tensor) -> Tensor:
    """z = b ⊙ k ⊙ k, [R, C, K], in `out`."""
    torch.mul(k, k, out=out)
    return out.mul_(beta.unsqueeze(-1)) if options.beta_aware else out


def forward(
    operands: Operands, options: Options, save: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(o, final_state, final_precond, saved): saved is the residual e and the path of d."""
    q, k, v, beta, log_gamma, log_alpha, initial_state, initial_precond, cu_seqlens = operands
    dtype, constant = operands.dtype, options.constant_precond(log_gamma is not None)
    layout, V = layout_of(k, cu_seqlens), v.shape[-1]
    groups = _groups(layout, q.device, max(q.shape[-1], V))
    # Sorted: rows that share a step lie together, [N·H, K, V] and [N·H, K].
    S, d, o = layout.sort(initial_state), layout.sort(initial_precond), v.new_empty(v.shape)
    # Room for all chunks at once; each group below writes its own rows.
    saved = saved_like(operands, options, save)
    # Groups in the order of time: S and d carry over from one to the next.
    with _exactly(q.device), torch.inference_mode():
        for i, j, sizes in groups:
            R, C, rows = sum(sizes), layout.C, layout.rows(i, j)
            # Without a backward the same tensors, but of this group only.
            kept = [x[rows] for x in saved[1:]] if save else _kept(d, R, C, V, options, log_gamma)
            # [R, 2 C, K], [R, C]
            pair, b = _pair(layout, k, q, i, j, dtype), layout.load(beta, i, j, dtype)
            kc = pair[:, :C]
            # Phase 1: d of every token, [R, C, K], or [R, 1, K] where it never moves.
            if constant:
                path = _hand_out(d, sizes)
            else:
                path = kept[3]
                # [R, C]
                gamma = None if log_gamma is None else layout.load(log_gamma, i, j, dtype).exp_()
                z = _learning_target(kc, b, options, torch.empty_like(path))
                p = phase1.Chunks(z, gamma, sizes, *kept[4:])
                # saved[0] tells the backward that a clip acted; it need not look if none did.
                if phase1.forward(p, path, d, options) and save:
                    saved[0].fill_(1)
            w = (kc * path).mul_(b.unsqueeze(-1))  # β d ⊙ k, [R, C, K]
            # Phase 2. −v above zeros: the products with S are added to them in place.
            minus_v = v.new_empty(R, 2 * C, V, dtype=dtype)
            layout.load_into(minus_v[:, :C], v, i, j).neg_()
            minus_v[:, C:].zero_()
            decay = _decay(layout, log_alpha, i, j, dtype)
            # [R, C, V]
            oc = phase2.forward(pair, minus_v, w, S, Kept(*kept[:3]), options.scale, sizes, decay)
            layout.store(oc, o, i, j)
        # With cu_seqlens the rows are an upper bound. Nobody may read what was never written.
        for x in saved[1:]:
            x[layout.rows(0, len(layout.active)).stop :].zero_()
    return o, layout.unsort(S), layout.unsort(d), saved


def saved_like(operands: Operands, options: Options, save: bool) -> list[Tensor]:
    """[whether the clip acted: 0 or 1, 0 until it is written] and the tensors of _kept."""
    if not save:
        return []
    C, R = size_of(operands.k, operands.cu_seqlens)
    d, V = operands.initial_precond, operands.v.shape[-1]
    return [d.new_zeros(1), *_kept(d, R, C, V, options, operands.log_gamma)]


def backward(
    do: Tensor,
    dfinal_state: Tensor,
    dfinal_precond: Tensor,
    operands: Operands,
    saved: list[Tensor],
    options: Options,
) -> list[Tensor]:
    """The gradients of operands.differentiable(), in its order."""
    q, k, v, beta, log_gamma, log_alpha, _, initial_precond, cu_seqlens = operands
    dtype, constant = operands.dtype, options.constant_precond(log_gamma is not None)
    layout = layout_of(k, cu_seqlens)
    groups, C = _groups(layout, q.device, max(q.shape[-1], v.shape[-1])), layout.C
    # dS and lam hold the gradients of the final states, and end as those of the initial ones.
    d0, clipped = layout.sort(initial_precond), bool(saved[0])
    dS, lam = layout.sort(dfinal_state), layout.sort(dfinal_precond)
    out = [x.new_empty(x.shape) for x in (q, k, v, beta)]
    # The gates that are given have gradients, those that are not have none.
    out += [x.new_empty(x.shape) for x in (log_gamma, log_alpha) if x is not None]
    with _exactly(q.device), torch.inference_mode():
        # The last group first: both gradients come from the end.
        for i, j, sizes in reversed(groups):
            rows = layout.rows(i, j)
            # The operands are loaded again: copies of them would double what is saved.
            kept = [x[rows] for x in saved[1:]]
            pair = _pair(layout, k, q, i, j, dtype)
            kc, b = pair[:, :C], layout.load(beta, i, j, dtype).unsqueeze(-1)
            # [R, 2 C, V]; phase 2 fills the upper half.
            y = do.new_empty(len(kc), 2 * C, do.shape[-1], dtype=dtype)
            layout.load_into(y[:, C:], do, i, j).mul_(options.scale)
            path = _hand_out(d0, sizes) if constant else kept[3]
            scaled = path * kc  # d ⊙ k, [R, C, K]
            w = scaled * b
            decay = _decay(layout, log_alpha, i, j, dtype)
            # Phase 2 first, then what it says about w is split between β, k and d.
            made = phase2.backward(pair, w, y, dS, Kept(*kept[:3]), sizes, decay)
            dpair, dv, dw, dlog_alpha = made
            dk, dq = dpair[:, :C], dpair[:, C:]
            db = torch.linalg.vecdot(dw, scaled)  # ⟨dw, d ⊙ k⟩, [R, C]
            dk.addcmul_(dw.mul_(b), path)
            results = [dq, dk, dv, db]
            if constant:
                # d is the same for all tokens: its gradient is the sum over them, [r, K] a step.
                for total in dw.mul_(kc).sum(1).split(sizes):
                    lam[: len(total)] += total
            else:
                gamma = None if log_gamma is None else layout.load(log_gamma, i, j, dtype).exp_()
                # Phase 1: its targets again, in the place of d ⊙ k, which is done with.
                z = _learning_target(kc, b[..., 0], options, scaled)
                p = phase1.Chunks(z, gamma, sizes, *kept[4:])
                dz, dlog_gamma = phase1.backward(p, path, dw.mul_(kc), w, lam, options, clipped)
                if options.beta_aware:
                    db += torch.linalg.vecdot(dz, kc * kc)  # z = b k ⊙ k: ⟨dz, k ⊙ k⟩ is β's part
                    dz.mul_(b)
                dk.addcmul_(dz, kc, value=2)  # and 2 dz ⊙ k is k's
                results += [] if dlog_gamma is None else [dlog_gamma]
            results += [] if dlog_alpha is None else [dlog_alpha]
            for x, y in zip(results, out):
                layout.store(x, y, i, j)
    return [*out, layout.unsort(dS), layout.unsort(lam)]


def step(token: Token, options: Options) -> Tensor:
    """One token: updates state [B, H, K, V] and precond [B, H, K] in place, returns o [B, H, V]."""
    q, k, v, beta, log_gamma, log_alpha, state, precond, *_ = token
    with _exactly(q.device):
        S, d, dtype = state.flatten(0, 1), precond.flatten(0, 1), v.dtype
        # Rows are B·H: S [R, K, V], d, q, k [R, K], v [R, V], b [R, 1].
        q, k, v = (x.flatten(0, 1).to(S.dtype) for x in (q, k, v))
        b = beta.flatten()[:, None]
        if log_alpha is not None:
            # Decay first, so that the residual is of the decayed memory.
            S.mul_(log_alpha.exp().flatten()[:, None, None])
        e = torch.baddbmm(v.unsqueeze(1), k.unsqueeze(1), S, alpha=-1)  # v − Sᵀ k, [R, 1, V]
        S.baddbmm_((d * k).mul_(b).unsqueeze(2), e)  # [R, K, 1] [R, 1, V]
        o = torch.bmm(q.unsqueeze(1), S).mul_(options.scale)  # [R, 1, V]
        # d moves last: the write above is with the d from before this token.
        if not options.constant_precond(log_gamma is not None):
            z = k * k * b if options.beta_aware else k * k
            x = 1 - torch.linalg.vecdot(d, z).unsqueeze(-1)  # [R, 1]
            if log_gamma is not None:
                d.mul_(log_gamma.exp().flatten()[:, None])
            d.addcmul_(x, z, value=options.eta)
            if options.precond_min is not None:
                d.clamp_(options.precond_min, options.precond_max)
        return o.view(*state.shape[:2], v.shape[-1]).to(dtype)
