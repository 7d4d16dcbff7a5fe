"""How the kernels read β, γ and α; pre and post are `precond_forward`'s.

Within a chunk every decay of d is exp(pre_t − post_j), and of the memory exp(post_t − post_j) with
α in place of γ. A difference of rounded sums is as wrong as the sums are large: a hard reset,
log γ = −1e4 or −inf, would spoil what came long after it. So a sum is kept as (n, f): each log γ is
an integer, whose sums and differences are exact, and a rest of at most a half. Gates of γ > 0.6
have n = 0.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LEAST_LOG = tl.constexpr(-128.0)  # its exp is 0 in float32, and −inf − (−inf) would be NaN


class Decay(NamedTuple):
    """How the memory decays within each chunk, with G_t = Σ log α from its start to token t.

    between: [B, T, H, CHUNK] in k's dtype, in the row of token j exp(G_i − G_j) at i ≥ j, else 0.
    ends: [B, T, H, 2] float32, exp(G_t) and exp(G_C − G_t).
    """

    between: Tensor
    ends: Tensor


@triton.jit
def load_gate(p, o_t, left, H: tl.constexpr):
    """A gate [B, T, H] at local tokens o_t, zero past the sequence's end."""
    return tl.load(p + o_t * H, mask=o_t < left, other=0.0)


@triton.jit
def load_retention(p, o_t, left, before, H: tl.constexpr, HAS_GAMMA: tl.constexpr):
    """(pre, post, post at the end) of a run of tokens, `before` being post just before it.

    Each is (n, f), whose sum it is; of zeros to start from, `before` is (0.0, 0.0).
    """
    n_before, f_before = before
    if HAS_GAMMA:
        log = tl.maximum(load_gate(p, o_t, left, H), LEAST_LOG, tl.PropagateNan.ALL)
        n = tl.ceil(log - 0.5)  # the nearest integer
        f = log - n
        n_post = n_before + tl.cumsum(n, 0)
        f_post = f_before + tl.cumsum(f, 0)
        pre, post = (n_post - n, f_post - f), (n_post, f_post)
        end = (n_before + tl.sum(n, 0), f_before + tl.sum(f, 0))
    else:
        zero = tl.zeros([o_t.shape[0]], tl.float32)
        pre, post, end = (zero, zero), (zero, zero), before
    return pre, post, end


@triton.jit
def store_ends(p, o_t, left, post, end, H: tl.constexpr):
    """Write what is left of S from a chunk's start at its tokens o_t, and from them at its end."""
    m_t = o_t < left
    tl.store(p + o_t * (H * 2), decay_from_start(post), mask=m_t)
    tl.store(p + o_t * (H * 2) + 1, decay(end, post), mask=m_t)


@triton.jit
def load_start(p, o_t, left, H: tl.constexpr):
    """exp(G) of tokens o_t, as `store_ends` wrote it."""
    return tl.load(p + o_t * (H * 2), mask=o_t < left, other=0.0)


@triton.jit
def load_end(p, o_t, left, H: tl.constexpr):
    """exp(G_C − G) of tokens o_t."""
    return tl.load(p + o_t * (H * 2) + 1, mask=o_t < left, other=0.0)


@triton.jit
def scale_rows(x, factor):
    """x [R, C] with each row times its factor [R], in x's dtype: an operand, not a sum."""
    return (x * factor[:, None]).to(x.dtype)


@triton.jit
def load_whole(p, left, BT: tl.constexpr, H: tl.constexpr):
    """exp(G_C), of the chunk's last token."""
    return tl.load(p + (tl.minimum(left, BT) - 1) * (H * 2))


@triton.jit
def decay(later, earlier):
    """What is left of d or S from one place to another, exp(later − earlier), at most 1.

    Rounded sums may differ by a little more than 0, and in a tile half of the pairs run backwards.
    """
    n, f = later
    n_0, f_0 = earlier
    return tl.exp(tl.minimum((n - n_0) + (f - f_0), 0.0, tl.PropagateNan.ALL))


@triton.jit
def decay_from_start(later):
    """The same from where the sums start."""
    n, f = later
    return tl.exp(tl.minimum(n + f, 0.0, tl.PropagateNan.ALL))


@triton.jit
def down(sums):
    """The places as the rows of a tile."""
    n, f = sums
    return n[:, None], f[:, None]


@triton.jit
def across(sums):
    """The places as the columns of a tile."""
    n, f = sums
    return n[None, :], f[None, :]


@triton.jit
def clip(u, d_min, d_max):
    """u in the box; a NaN stays one."""
    u = tl.maximum(u, d_min, tl.PropagateNan.ALL)
    return tl.minimum(u, d_max, tl.PropagateNan.ALL)
