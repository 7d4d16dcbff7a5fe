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
from osdn.ops.phase1 import unit_upper_inverse
from osdn.ops.rule import Rule
from osdn.ops.varlen import Layout, layout_of

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


def _residuals(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, S: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """(e, q S), both [R, C, V], of a group; S [N·H, K, V] moves to its end. q, k, w: [R, C, K]."""
    inverse = unit_upper_inverse(torch.bmm(w, k.mT).triu_(1)).mT
    e, reads = torch.empty_like(v), torch.empty_like(v)
    steps = zip(*(x.split(sizes) for x in (q, k, v, w.mT, inverse, e, reads)))
    for q_n, k_n, v_n, w_n, inverse_n, e_n, reads_n in steps:
        now = S[: len(q_n)]
        torch.bmm(q_n, now, out=reads_n)
        torch.bmm(inverse_n, torch.baddbmm(v_n, k_n, now, alpha=-1), out=e_n)
        now.baddbmm_(w_n, e_n)
    return e, reads


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
        d = _hand_out(d0, sizes) if constant else layout.load(saved[1], i, j, S.dtype)
        w = kc.mul_(d).mul_(layout.load(beta, i, j, S.dtype).unsqueeze(-1))
        states = S.new_empty(len(kc), *S.shape[1:])
        for state_n, w_n, e_n in zip(*(x.split(sizes) for x in (states, w.mT, e))):
            now = S[: len(w_n)]
            state_n.copy_(now)
            now.baddbmm_(w_n, e_n)
        starts.append(states)
    return starts


class Gradients(NamedTuple):
    """Gradients of one group's chunks, [R, C, ·]; dw is that of the write keys."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dw: Tensor


def _memory_backward(
    q: Tensor, k: Tensor, w: Tensor, e: Tensor, do: Tensor, S: Tensor, dS: Tensor, sizes: list[int]
) -> Gradients:
    """Backward of the memory over a group, see the module; dS [N·H, K, V] moves to its start.

    S: [R, K, V] at the start of every chunk; the other tensors [R, C, ·].
    """
    inverse = unit_upper_inverse(torch.bmm(w, k.mT).triu_(1)).neg_()
    Pt = torch.bmm(w, q.mT).triu_()
    de = torch.bmm(Pt, do)
    ends, minus_z = torch.empty_like(S), torch.empty_like(e)
    steps = zip(*(x.split(sizes) for x in (q.mT, k.mT, w, do, de, inverse, ends, minus_z)))
    for q_n, k_n, w_n, do_n, de_n, inverse_n, end_n, minus_z_n in reversed(list(steps)):
        now = dS[: len(w_n)]
        end_n.copy_(now)
        torch.bmm(inverse_n, de_n.baddbmm_(w_n, now), out=minus_z_n)
        now.baddbmm_(q_n, do_n).baddbmm_(k_n, minus_z_n)
    dP = torch.bmm(do, e.mT).tril_()
    dA = torch.bmm(minus_z, e.mT).tril_(-1)
    dq = torch.bmm(do, S.mT).baddbmm_(dP, w)
    dk = torch.bmm(minus_z, S.mT).baddbmm_(dA, w)
    dw = torch.bmm(e, ends.mT).baddbmm_(dP.mT, q).baddbmm_(dA.mT, k)
    return Gradients(dq, dk, minus_z.neg_(), dw)


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
        o = v.new_empty(v.shape)
        saved = saved_like(q, k, v, beta, log_gamma, initial_state, None, cu_seqlens, save)
        for i, j, sizes in _groups(layout, q.device, max(q.shape[-1], v.shape[-1])):
            qc, kc, vc, b = (layout.load(x, i, j, dtype) for x in (q, k, v, beta))
            if constant:
                path = _hand_out(d, sizes)
            else:
                gc = None if log_gamma is None else layout.load(log_gamma, i, j, dtype)
                p = phase1.prepare(_learning_target(kc, b, rule), gc, sizes, rule.eta)
                path = phase1.forward(p, d, rule)
            w = (kc * path).mul_(b.unsqueeze(-1))
            e, reads = _residuals(qc, kc, vc, w, S, sizes)
            P = torch.bmm(qc, w.mT).tril_()
            layout.store(reads.baddbmm_(P, e, beta=rule.scale, alpha=rule.scale), o, i, j)
            if save:
                layout.store(e, saved[0], i, j)
                if not constant:
                    layout.store(path, saved[1], i, j)
        return o, layout.unsort(S), layout.unsort(d), saved


def saved_like(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    initial_state: Tensor,
    initial_precond: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
) -> list[Tensor]:
    """[e like v, d like k] in the accumulation dtype; d stays unwritten where it never moves."""
    return [initial_state.new_empty(x.shape) for x in (v, k)] if save else []


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
        dS, lam = layout.sort(dfinal_state), layout.sort(dfinal_precond)
        out = [x.new_empty(x.shape) for x in (q, k, v, beta)]
        out += [] if log_gamma is None else [log_gamma.new_empty(log_gamma.shape)]
        for i, j, sizes in reversed(groups):
            qc, kc, e, b = (layout.load(x, i, j, dtype) for x in (q, k, saved[0], beta))
            doc = layout.load(do, i, j, dtype).mul_(rule.scale)
            path = _hand_out(d0, sizes) if constant else layout.load(saved[1], i, j, dtype, inside)
            b = b.unsqueeze(-1)
            scaled = path * kc
            w = scaled * b
            g = _memory_backward(qc, kc, w, e, doc, states.pop(), dS, sizes)
            db = torch.linalg.vecdot(g.dw, scaled)
            dwb = g.dw.mul_(b)
            g.dk.addcmul_(dwb, path)
            dd = dwb.mul_(kc)
            if constant:
                for total in dd.sum(1).split(sizes):
                    lam[: len(total)] += total
                dlog_gamma = None
            else:
                gc = None if log_gamma is None else layout.load(log_gamma, i, j, dtype)
                p = phase1.prepare(_learning_target(kc, b[..., 0], rule), gc, sizes, rule.eta)
                dz, dlog_gamma = phase1.backward(p, path, dd, lam, rule)
                if rule.beta_aware:
                    db += torch.linalg.vecdot(dz, kc * kc)
                    dz.mul_(b)
                g.dk.addcmul_(dz, kc, value=2)
            results = [g.dq, g.dk, g.dv, db] + ([] if dlog_gamma is None else [dlog_gamma])
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
