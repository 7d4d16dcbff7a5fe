"""The operator in plain PyTorch, chunk by chunk, on any device, with a hand-written backward.

Per chunk of C tokens with start state S and write keys w_t = β_t d_t ⊙ k_t (d from phase1.py):

    E  = (I + tril(k wᵀ, −1))⁻¹          e = E (v − k S)            residuals, [C, V]
    o  = scale · (q S + tril(q wᵀ) e)    S ← S + wᵀ e

Backward with P = tril(q wᵀ), do already times scale and dS the gradient of the chunk's final S:

    z  = Eᵀ (Pᵀ do + w dS)    dP = tril(do eᵀ)    dA = −tril(z eᵀ, −1)
    dq = do Sᵀ + dP w    dk = −z Sᵀ + dA w    dv = z    dw = e dSᵀ + dPᵀ q + dAᵀ k
    dS ← dS + qᵀ do − kᵀ z

then dk += β d dw, dβ = ⟨dw, d ⊙ k⟩, and dd = β k dw goes to phase 1's reverse scan. All of it is in
float32 (float64 for float64 input). Work goes group by group of chunks, to stay in the cache;
nothing of size T×T or T×K×V exists. The four functions at the end are the contract of
osdn.ops.registration.

Source: arXiv 2605.13473 for the rule; arXiv 2406.06484 for the delta rule in chunks (there with
v′ = β e and w = k).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from osdn.ops import phase1
from osdn.ops.rule import Rule
from osdn.ops.varlen import Layout, chunk_size, layout_of

# Floats a tensor of a group of chunks: about 25 such tensors live at once.
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
    tf32 = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if tf32:
            torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            if tf32:
                torch.backends.cuda.matmul.allow_tf32 = True


def _pair(layout: Layout, k: Tensor, q: Tensor, i: int, j: int, dtype: torch.dtype) -> Tensor:
    """k above q, [R, 2 C, K]: what both multiply, they multiply in one product."""
    pair = k.new_empty(sum(layout.sizes(i, j)), 2 * layout.C, k.shape[-1], dtype=dtype)
    layout.load_into(pair[:, : layout.C], k, i, j)
    layout.load_into(pair[:, layout.C :], q, i, j)
    return pair


def _memory(
    pair: Tensor, minus_v: Tensor, w: Tensor, S: Tensor, scale: float, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, e, −E), [R, C, ·], of a group; S [N·H, K, V] moves to its end.

    pair: k above q, [R, 2 C, K].  minus_v: −v above zeros, [R, 2 C, V]; overwritten.
    """
    C = w.shape[1]
    lower, minus_E = torch.bmm(pair, w.mT), w.new_empty(len(w), C, C)
    minus_one = torch.eye(C, dtype=w.dtype, device=w.device).neg_().expand_as(minus_E)
    # With `out` row by row this is three times as fast as without: nothing is transposed.
    torch.linalg.solve_triangular(
        lower[:, :C], minus_one, upper=False, unitriangular=True, out=minus_E
    )
    e, reads = torch.empty_like(minus_v[:, :C], memory_format=torch.contiguous_format), minus_v
    steps = zip(*(x.split(sizes) for x in (pair, reads, reads[:, :C], minus_E, e, w.mT)))
    for pair_n, reads_n, error_n, minus_E_n, e_n, wt_n in steps:
        now = S[: len(pair_n)]
        reads_n.baddbmm_(pair_n, now)
        torch.bmm(minus_E_n, error_n, out=e_n)
        now.baddbmm_(wt_n, e_n)
    o = torch.baddbmm(reads[:, C:], lower[:, C:].tril(), e, beta=scale, alpha=scale)
    return o, e, minus_E


def _hand_out(d: Tensor, sizes: list[int]) -> Tensor:
    """d [N·H, K] for every chunk of a group, where it never moves: [R, 1, K]."""
    return torch.cat([d[:n] for n in sizes]).unsqueeze(1)


def _learning_target(k: Tensor, beta: Tensor, rule: Rule) -> Tensor:
    """z = b ⊙ k ⊙ k, [R, C, K]."""
    s = k * k
    return s.mul_(beta.unsqueeze(-1)) if rule.beta_aware else s


def _states(
    tensors: tuple[Tensor, ...], saved: list[Tensor], d0: Tensor, S: Tensor, rule: Rule,
    groups: list[Group], layout: Layout, constant: bool,
) -> list[Tensor]:  # fmt: skip
    """S at the start of every chunk, a tensor [R, K, V] a group, from the saved residuals."""
    k, beta = tensors
    starts = []
    for i, j, sizes in groups:
        kc, e = (layout.load(x, i, j, S.dtype) for x in (k, saved[0]))
        d = _hand_out(d0, sizes) if constant else layout.load(saved[2], i, j, S.dtype)
        w = kc.mul_(d).mul_(layout.load(beta, i, j, S.dtype).unsqueeze(-1))
        states = S.new_empty(len(kc), *S.shape[1:])
        for state_n, w_n, e_n in zip(*(x.split(sizes) for x in (states, w.mT, e))):
            now = S[: len(w_n)]
            state_n.copy_(now)
            now.baddbmm_(w_n, e_n)
        starts.append(states)
    return starts


def _two_triangles(like: Tensor) -> Tensor:
    """Ones below the diagonal, and under them ones on and below it: [2 C, C]."""
    ones = like.new_ones(like.shape[1], like.shape[1])
    return torch.cat((ones.tril(-1), ones.tril()))


def _memory_backward(
    pair: Tensor, w: Tensor, e: Tensor, minus_E: Tensor, y: Tensor, S: Tensor, dS: Tensor,
    sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dk above dq, dv, dw) of a group, see the module; dS [N·H, K, V] moves to its start.

    S: [R, K, V] at the start of every chunk.  y: [R, 2 C, V], do times scale in its lower half;
    its upper half becomes −z.  The other tensors as in _memory.
    """
    C = w.shape[1]
    minus_z, ends = torch.empty_like(e), torch.empty_like(S)
    P = torch.bmm(pair[:, C:], w.mT).tril_()
    de = torch.bmm(P.mT, y[:, C:])
    pieces = (pair.mT, y, y[:, :C], w, de, minus_E.mT, ends, minus_z)
    steps = list(zip(*(x.split(sizes) for x in pieces)))
    for pair_n, y_n, upper_n, w_n, de_n, minus_E_n, end_n, minus_z_n in reversed(steps):
        now = dS[: len(w_n)]
        end_n.copy_(now)
        torch.bmm(minus_E_n, de_n.baddbmm_(w_n, now), out=minus_z_n)
        upper_n.copy_(minus_z_n)
        now.baddbmm_(pair_n, y_n)
    products = torch.bmm(y, e.mT).mul_(_two_triangles(w))  # dA above dP
    dpair = torch.bmm(y, S.mT).baddbmm_(products, w)
    dw = torch.bmm(e, ends.mT).baddbmm_(products.mT, pair)
    return dpair, minus_z.neg_(), dw


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
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(o, final_state, final_precond, saved): saved is the residual e and the path of d."""
    dtype, constant = initial_state.dtype, rule.constant_precond(log_gamma is not None)
    layout = layout_of(k, cu_seqlens)
    with _exactly(q.device):
        S, d = layout.sort(initial_state), layout.sort(initial_precond)
        o, C = v.new_empty(v.shape), layout.C
        tensors = (q, k, v, beta, log_gamma, initial_state, initial_precond, cu_seqlens)
        saved = saved_like(*tensors, rule, save)
        for i, j, sizes in _groups(layout, q.device, max(q.shape[-1], v.shape[-1])):
            pair, b = _pair(layout, k, q, i, j, dtype), layout.load(beta, i, j, dtype)
            kc = pair[:, :C]
            if constant:
                path = _hand_out(d, sizes)
            else:
                gc = None if log_gamma is None else layout.load(log_gamma, i, j, dtype)
                p = phase1.prepare(_learning_target(kc, b, rule), gc, None, sizes, rule.eta)
                path, clipped = phase1.forward(p, d, rule)
            w = (kc * path).mul_(b.unsqueeze(-1))
            minus_v = v.new_zeros(len(w), 2 * C, v.shape[-1], dtype=dtype)
            layout.load_into(minus_v[:, :C], v, i, j).neg_()
            oc, e, minus_E = _memory(pair, minus_v, w, S, rule.scale, sizes)
            layout.store(oc, o, i, j)
            kept = [e, minus_E] if constant else [e, minus_E, path, p.L]
            for chunks, tokens in zip(kept, saved):
                layout.store(chunks, tokens, i, j)
            if save and not constant and clipped:
                saved[4].fill_(1)
        return o, layout.unsort(S), layout.unsort(d), saved


def saved_like(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    initial_state: Tensor,
    initial_precond: Tensor,
    cu_seqlens: Tensor | None,
    rule: Rule,
    save: bool,
) -> list[Tensor]:
    """[e like v, −E [B, T, H, C]] and, where d moves, [d like k, L like E, whether the clip acted].

    In the accumulation dtype; the last is 0 or 1, 0 until it is written.
    """
    if not save:
        return []
    C = chunk_size(k.shape[1])
    wide = initial_state.new_empty
    saved = [wide(v.shape), wide(*k.shape[:3], C)]
    if rule.constant_precond(log_gamma is not None):
        return saved
    return [*saved, wide(k.shape), wide(*k.shape[:3], C), initial_state.new_zeros(1)]


def backward(
    do: Tensor,
    dfinal_state: Tensor,
    dfinal_precond: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    initial_state: Tensor,
    initial_precond: Tensor,
    cu_seqlens: Tensor | None,
    saved: list[Tensor],
    rule: Rule,
) -> list[Tensor]:
    """[dq, dk, dv, dbeta, dinitial_state, dinitial_precond] + [dlog_gamma] where it was given."""
    dtype, constant = initial_state.dtype, rule.constant_precond(log_gamma is not None)
    layout = layout_of(k, cu_seqlens)
    groups = _groups(layout, q.device, max(q.shape[-1], v.shape[-1]))
    inside = 0.0 if rule.precond_min is None else rule.precond_min
    with _exactly(q.device):
        d0, S0 = layout.sort(initial_precond), layout.sort(initial_state)
        states = _states((k, beta), saved, d0, S0, rule, groups, layout, constant)
        clipped = not constant and bool(saved[4])
        dS, lam = layout.sort(dfinal_state), layout.sort(dfinal_precond)
        out = [x.new_empty(x.shape) for x in (q, k, v, beta)]
        out += [] if log_gamma is None else [log_gamma.new_empty(log_gamma.shape)]
        for i, j, sizes in reversed(groups):
            pair = _pair(layout, k, q, i, j, dtype)
            e, minus_E, b = (layout.load(x, i, j, dtype) for x in (*saved[:2], beta))
            kc, C = pair[:, : layout.C], layout.C
            y = do.new_empty(len(e), 2 * C, e.shape[-1], dtype=dtype)
            layout.load_into(y[:, C:], do, i, j).mul_(rule.scale)
            path = _hand_out(d0, sizes) if constant else layout.load(saved[2], i, j, dtype, inside)
            b = b.unsqueeze(-1)
            scaled = path * kc
            dpair, dv, dw = _memory_backward(
                pair, scaled * b, e, minus_E, y, states.pop(), dS, sizes
            )
            dk, dq = dpair[:, :C], dpair[:, C:]
            db = torch.linalg.vecdot(dw, scaled)
            dk.addcmul_(dw.mul_(b), path)
            results = [dq, dk, dv, db]
            if constant:
                for total in dw.mul_(kc).sum(1).split(sizes):
                    lam[: len(total)] += total
            else:
                gc = None if log_gamma is None else layout.load(log_gamma, i, j, dtype)
                L = layout.load(saved[3], i, j, dtype)
                p = phase1.prepare(_learning_target(kc, b[..., 0], rule), gc, L, sizes, rule.eta)
                g = dw.new_empty(len(dw), C + 1, dw.shape[-1])
                torch.mul(dw, kc, out=g[:, :C])
                dz, dlog_gamma = phase1.backward(p, path, g, lam, rule, clipped)
                if rule.beta_aware:
                    db += torch.linalg.vecdot(dz, kc * kc)
                    dz.mul_(b)
                dk.addcmul_(dz, kc, value=2)
                results += [] if dlog_gamma is None else [dlog_gamma]
            for x, y in zip(results, out):
                layout.store(x, y, i, j)
        return [*out[:4], layout.unsort(dS), layout.unsort(lam), *out[4:]]


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
    with _exactly(q.device):
        S, d, dtype = state.flatten(0, 1), precond.flatten(0, 1), v.dtype
        q, k, v = (x.flatten(0, 1).to(S.dtype) for x in (q, k, v))
        b = beta.flatten()[:, None]
        e = torch.baddbmm(v.unsqueeze(1), k.unsqueeze(1), S, alpha=-1)
        S.baddbmm_((d * k).mul_(b).unsqueeze(2), e)
        o = torch.bmm(q.unsqueeze(1), S).mul_(rule.scale)
        if not rule.constant_precond(log_gamma is not None):
            z = k * k * b if rule.beta_aware else k * k
            x = 1 - torch.linalg.vecdot(d, z).unsqueeze(-1)
            if log_gamma is not None:
                d.mul_(log_gamma.exp().flatten()[:, None])
            d.addcmul_(x, z, value=rule.eta)
            if rule.precond_min is not None:
                d.clamp_(rule.precond_min, rule.precond_max)
        return o.view(*state.shape[:2], -1).to(dtype)
