"""How phase 1's kernels read β and γ; pre and post are `precond_forward`'s."""

import triton
import triton.language as tl


@triton.jit
def load_gate(p, o_t, left, H: tl.constexpr):
    """A gate [B, T, H] at local tokens o_t, zero past the sequence's end."""
    return tl.load(p + o_t * H, mask=o_t < left, other=0.0)


@triton.jit
def load_retention(p, o_t, left, before, H: tl.constexpr, HAS_GAMMA: tl.constexpr):
    """(pre, post, post at the end) of a run of tokens, `before` being post just before it."""
    if HAS_GAMMA:
        log_gamma = load_gate(p, o_t, left, H)
        post = before + tl.cumsum(log_gamma, 0)
        pre = post - log_gamma
        end = before + tl.sum(log_gamma, 0)
    else:
        post = tl.zeros([o_t.shape[0]], tl.float32)
        pre = post
        end = before
    return pre, post, end
