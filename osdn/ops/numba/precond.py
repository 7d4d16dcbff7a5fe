"""Phase 1 as machine code: the preconditioner of one head, exact clip included, and its gradient.

    x_t     = 1 − b_t ⟨d_t, k_t ⊙ k_t⟩
    d_{t+1} = clip(γ_t d_t + η b_t x_t k_t ⊙ k_t, d_min, d_max)

A row of d is K numbers padded to whole vectors of W lanes. Arrays and `sizes` are those of
osdn.ops.numba.walk. Source: docs/explanation/operator.md.
"""

import math

from osdn.ops.numba.vectors import (
    AHEAD,
    choose,
    fetch,
    fma,
    inlined,
    lanes,
    load,
    load_all,
    store,
    store_all,
    total,
    zeros,
)


@inlined
def energy(d, at, k, row, K):
    """⟨d_t, k_t ⊙ k_t⟩."""
    x = zeros(d)
    for i in range(0, K, lanes(d)):
        key = load(k, row + i, K - i)  # W of the K features
        # (k d) k and not d (k k): one rounding order for forward and backward.
        x = fma(fma(key, load_all(d, at + i), 0.0), key, x)
    return total(x)


@inlined
def moved(d, key, gamma, rate):
    """γ d + rate k ⊙ k: the next preconditioner before the clip."""
    return fma(fma(rate, key, 0.0), key, fma(gamma, d, 0.0))


@inlined
def retained(log_gamma, row):
    """γ of a token; 1 where no log γ was given."""
    return math.exp(log_gamma[row]) if log_gamma.size else 1.0


@inlined
def begin(d, at, precond, source, K):
    """The preconditioner of a head, at `source` in precond, to the row of d at `at`."""
    for i in range(0, K, lanes(d)):
        store_all(d, at + i, load(precond, source + i, K - i))


@inlined
def preconditioners(d, at, first, T, sizes, rule, k, beta, log_gamma):
    """d_2 .. d_{T+1} in the padded rows after d_1, which is at `at`; phase 1."""
    H, K = sizes[:2]
    eta, aware, low, high = rule[:4]
    # Rows of whole vectors: lanes past K hold zeros (k's are), and need no mask.
    W = lanes(d)
    wide = -(-K // W) * W
    for row in range(first, first + T * H, H):
        # Twice as far ahead as in memory.py: a token here takes less time.
        fetch(k, row + 2 * AHEAD * H, K, 0, K)
        b = beta[row] if aware else 1.0
        retention = retained(log_gamma, row)
        # One scalar a token, η b x; then d moves feature by feature.
        rate = eta * b * (1.0 - b * energy(d, at, k, row * K, K))
        for i in range(0, K, W):
            key = load(k, row * K + i, K - i)
            u = moved(load_all(d, at + i), key, retention, rate)  # [W]
            store_all(d, at + wide + i, choose(u, low, high, low, u, high))
        # All rows of the block are kept: the memory reads d_t once for each panel.
        at += wide


@inlined
def backward_precond(job, first, T, sizes, rule, d, at, wide, carry, k, beta, log_gamma, gradients):
    """Phase 1 reversed, carrying λ = ∂/∂d_{t+1}: turns ∂/∂(d ⊙ k), found in dk, into dk.

    With g = λ where the clip let u through, else 0, and x, b, s, u as in the forward:
    dx = η b ⟨g, s⟩;  dlog γ = γ ⟨g, d⟩;  db = η x ⟨g, s⟩ − dx ⟨d, s⟩;  ds = η b x g − dx b d;
    dk = ∂/∂(d ⊙ k) ⊙ d + 2 k ds;  λ ← ∂/∂(d ⊙ k) ⊙ k + γ g − b dx s.
    """
    H, K = sizes[:2]
    eta, aware, low, high, _, moves = rule
    dk, dbeta, dlog_gamma, dprecond = gradients
    W = lanes(d)
    begin(carry, 0, dprecond, job * K, K)  # λ, [K]
    # From the row after the last token's back to the first token's.
    at += T * wide
    for row in range(first + (T - 1) * H, first - 1, -H):
        at -= wide
        fetch(k, row - 2 * AHEAD * H, K, 0, K)
        fetch(dk, row - 2 * AHEAD * H, K, 0, K)
        b = beta[row] if aware else 1.0
        retention = retained(log_gamma, row)
        rate, dx = 0.0, 0.0
        # First the sums over K, which every feature needs.
        if moves:
            ds_dot = energy(d, at, k, row * K, K)
            x = 1.0 - b * ds_dot
            rate = eta * b * x
            along_s, along_d = zeros(d), zeros(d)
            for i in range(0, K, W):
                key, di = load(k, row * K + i, K - i), load_all(d, at + i)
                # u again, by the forward's own instructions: so the mask is the forward's too.
                u = moved(di, key, retention, rate)
                # λ where the clip let u through, [W]
                g = choose(u, low, high, 0.0, load_all(carry, i), 0.0)
                store_all(carry, i, g)
                along_s = fma(fma(g, key, 0.0), key, along_s)  # ⟨g, s⟩, lane by lane
                along_d = fma(g, di, along_d)  # ⟨g, d⟩
            gs = total(along_s)
            # x enters d_{t+1} by η b x s alone.
            dx = eta * b * gs
            if log_gamma.size:
                dlog_gamma[row] = retention * total(along_d)
            if aware:
                # β acts twice: as a factor of the step, and within x.
                dbeta[row] += eta * x * gs - dx * ds_dot
        # Then feature by feature: dk, and λ of the token before.
        for i in range(0, K, W):
            key, di, g = load(k, row * K + i, K - i), load_all(d, at + i), load_all(carry, i)
            dkw = load(dk, row * K + i, K - i)  # ∂/∂(d ⊙ k), from phase 2, [W]
            ds = fma(rate, g, fma(-b * dx, di, 0.0))
            store(dk, row * K + i, fma(fma(2.0, key, 0.0), ds, fma(dkw, di, 0.0)), K - i)
            g = fma(retention, g, fma(fma(-b * dx, key, 0.0), key, 0.0))
            store_all(carry, i, fma(dkw, key, g))
    for i in range(0, K, W):
        store(dprecond, job * K + i, load_all(carry, i), K - i)
