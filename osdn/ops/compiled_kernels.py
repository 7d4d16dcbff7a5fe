"""The token recurrence and its derivative as machine code for the CPU; see osdn.ops.compiled.

A job is one head of one sequence. Its memory S is cut into panels of as many columns as a vector
has lanes. Columns of S never mix, so a panel (K × 128 bytes) runs through the whole sequence in the
first-level cache, and one pass over it serves one token (w_t = β_t d_t ⊙ k_t, G = ∂/∂S):

    forward    S += w_{t−1} e_{t−1}ᵀ; the same pass sums Sᵀk_t and Sᵀq_{t−1}
    backward   reversed in time, G += scale q_t do_tᵀ − k_{t+1} de_{t+1}ᵀ; the same pass sums
               a = Gᵀ(d_t ⊙ k_t) and G e_t:  dv = de = β a,  dβ = ⟨a, e⟩,  ∂/∂(d ⊙ k) = β G e
               forward in time over Sᵀ:  dq = scale S_t do,  dk −= S_{t−1} de

The preconditioner comes first, for all tokens, exact clip included. Of what the forward knew the
backward wants e_t alone: it computes d_t again, by the same instructions, so that its clip mask is
the forward's.

Arrays are flat and contiguous. Row r of q is q[r K : (r + 1) K] with r = token H + head; job
n H + h has the tokens from bounds[n] to bounds[n + 1]. `sizes` is (H, K, V), `rule` is (η,
beta_aware, d_min, d_max, scale, whether d moves); an array of size 0 stands for one that was not
given or is not wanted.
"""

import numpy as np

from osdn.ops.compiled_vectors import (
    choose,
    entry,
    fma,
    inlined,
    lanes,
    load_all,
    load_some,
    spread,
    store_all,
    store_some,
    total,
    zeros,
)


@inlined
def load(array, index, count):
    """A vector from array[index] on; past `count` numbers, zeros."""
    return load_all(array, index) if count >= lanes(array) else load_some(array, index, count)


@inlined
def store(array, index, x, count):
    """x to array[index] on, `count` numbers at most."""
    if count >= lanes(array):
        store_all(array, index, x)
    else:
        store_some(array, index, x, count)


@inlined
def scratch(like, rows, columns):
    """Zeros for rows of `columns` numbers padded to whole vectors, aligned to a cache line."""
    W = lanes(like)
    line = 64 // like.itemsize
    array = np.zeros(rows * (-(-columns // W) * W) + line, like.dtype)
    skip = (-array.ctypes.data % 64) // like.itemsize
    return array[skip:]


@inlined
def energy(d, at, k, row, K):
    """⟨d_t, k_t ⊙ k_t⟩."""
    x = zeros(d)
    for i in range(0, K, lanes(d)):
        key = load(k, row + i, K - i)
        x = fma(fma(key, load_all(d, at + i), 0.0), key, x)
    return total(x)


@inlined
def moved(d, key, gamma, rate):
    """γ d + rate k ⊙ k: the next preconditioner before the clip."""
    return fma(fma(rate, key, 0.0), key, fma(gamma, d, 0.0))


@inlined
def preconditioners(job, first, T, sizes, rule, k, beta, gamma, start):
    """d_1 .. d_{T+1} in padded rows, and the row length; one row and 0 where d does not move."""
    H, K = sizes[:2]
    eta, aware, low, high, _, moves = rule
    W = lanes(k)
    wide = -(-K // W) * W
    d = scratch(k, T + 1 if moves else 1, K)
    for i in range(0, K, W):
        store_all(d, i, load(start, job * K + i, K - i))
    for t in range(T if moves else 0):
        row, at = first + t * H, t * wide
        b = beta[row] if aware else 1.0
        retention = gamma[row] if gamma.size else 1.0
        rate = eta * b * (1.0 - b * energy(d, at, k, row * K, K))
        for i in range(0, K, W):
            key = load(k, row * K + i, K - i)
            u = moved(load_all(d, at + i), key, retention, rate)
            store_all(d, at + wide + i, choose(u, low, high, low, u, high))
    return d, wide if moves else 0


@inlined
def weigh(w, d, at, k, row, K, factor):
    """w = factor d_t ⊙ k_t."""
    for i in range(0, K, lanes(w)):
        key = load(k, row + i, K - i)
        store_all(w, i, fma(fma(factor, load_all(d, at + i), 0.0), key, 0.0))


@inlined
def forward_panel(p, job, first, T, sizes, scale, d, wide, S, w, arrays):
    """o and e of columns p and following of the values, and the memory after the last token."""
    H, K, V = sizes
    q, k, v, beta, state, o, errors, final_state = arrays
    W, count = lanes(S), V - p
    for i in range(K):
        store_all(S, i * W, load(state, (job * K + i) * V + p, count))
        w[i] = 0
    e = zeros(S)
    for t in range(T + 1):
        row, last = first + min(t, T - 1) * H, first + max(t - 1, 0) * H
        a, b = zeros(S), zeros(S)
        for i in range(K):
            s = fma(spread(w, i), e, load_all(S, i * W))
            store_all(S, i * W, s)
            a = fma(spread(k, row * K + i), s, a)
            b = fma(spread(q, last * K + i), s, b)
        if t > 0:
            store(o, last * V + p, fma(scale, b, 0.0), count)
        if t < T:
            e = fma(-1.0, a, load(v, row * V + p, count))
            if errors.size:
                store(errors, row * V + p, e, count)
            weigh(w, d, t * wide, k, row * K, K, beta[row])
    for i in range(K):
        store(final_state, (job * K + i) * V + p, load_all(S, i * W), count)


@entry
def forward(jobs, bounds, sizes, rule, given, out):
    """The jobs from jobs[0] to jobs[1]: given (q, k, v, beta, gamma, state, precond), out (o, e,
    final_state, final_precond); the last two may be the memory that state and precond are in."""
    H, K, V = sizes
    q, k, v, beta, gamma, state, precond = given
    o, e, final_state, final_precond = out
    W, arrays = lanes(k), (q, k, v, beta, state, o, e, final_state)
    S, w = scratch(k, K, W), scratch(k, 1, K)
    for job in range(jobs[0], jobs[1]):
        n, h = divmod(job, H)
        first, T = bounds[n] * H + h, bounds[n + 1] - bounds[n]
        d, wide = preconditioners(job, first, T, sizes, rule, k, beta, gamma, precond)
        for p in range(0, V, W):
            forward_panel(p, job, first, T, sizes, rule[4], d, wide, S, w, arrays)
        for i in range(0, K, W):
            store(final_precond, job * K + i, load_all(d, T * wide + i), K - i)


@inlined
def backward_memory(p, job, first, T, sizes, scale, d, wide, scratches, arrays, gradients):
    """Over G, last token first: dv, this panel's share of dβ and of ∂/∂(d ⊙ k), left in dk."""
    H, K, V = sizes
    q, k, beta, errors, do, dfinal_state = arrays
    dk, dv, dbeta, dstate = gradients
    G, w, r = scratches
    W, count = lanes(G), V - p
    for i in range(K):
        store_all(G, i * W, load(dfinal_state, (job * K + i) * V + p, count))
    de, after = zeros(G), first + (T - 1) * H
    for t in range(T - 1, -1, -1):
        row = first + t * H
        weigh(w, d, t * wide, k, row * K, K, 1.0)
        e = load(errors, row * V + p, count)
        read = fma(scale, load(do, row * V + p, count), 0.0)
        a = zeros(G)
        for i in range(K):
            g = fma(spread(k, after * K + i), de, load_all(G, i * W))
            g = fma(spread(q, row * K + i), read, g)
            store_all(G, i * W, g)
            a = fma(spread(w, i), g, a)
            r[i] = total(fma(g, e, 0.0))
        de, after = fma(-beta[row], a, 0.0), row
        store(dv, row * V + p, fma(beta[row], a, 0.0), count)
        dbeta[row] = (dbeta[row] if p else 0) + total(fma(a, e, 0.0))
        for i in range(0, K, W):
            share = load(dk, row * K + i, K - i) if p else zeros(G)
            store(dk, row * K + i, fma(beta[row], load_all(r, i), share), K - i)
    for i in range(K):
        g = fma(spread(k, after * K + i), de, load_all(G, i * W))
        store(dstate, (job * K + i) * V + p, g, count)


@inlined
def backward_reads(p, job, first, T, sizes, scale, d, wide, S, arrays, gradients):
    """Over Sᵀ, first token first, columns p and following of the keys: dq, and dk −= S_{t−1} de."""
    H, K, V = sizes
    k, beta, state, errors, do = arrays
    dq, dk, dv = gradients
    W, count = lanes(S), K - p
    for j in range(V):
        for i in range(W):
            S[j * W + i] = state[(job * K + p + i) * V + j] if i < count else 0
    for t in range(T):
        row = first + t * H
        key = load(k, row * K + p, count)
        w = fma(fma(beta[row], load_all(d, t * wide + p), 0.0), key, 0.0)
        a, b = zeros(S), zeros(S)
        for j in range(V):
            s = load_all(S, j * W)
            a = fma(spread(dv, row * V + j), s, a)
            s = fma(spread(errors, row * V + j), w, s)
            store_all(S, j * W, s)
            b = fma(spread(do, row * V + j), s, b)
        store(dq, row * K + p, fma(scale, b, 0.0), count)
        store(dk, row * K + p, fma(-1.0, a, load(dk, row * K + p, count)), count)


@inlined
def backward_precond(job, first, T, sizes, rule, d, wide, carry, k, beta, gamma, ends, gradients):
    """Phase 1 reversed, carrying λ = ∂/∂d_{t+1}: turns ∂/∂(d ⊙ k), found in dk, into dk.

    With g = λ where the clip let u through, else 0, and x, b, s, u as in the forward:
    dx = η b ⟨g, s⟩;  dγ = ⟨g, d⟩;  db = η x ⟨g, s⟩ − dx ⟨d, s⟩;  ds = η b x g − dx b d;
    dk = ∂/∂(d ⊙ k) ⊙ d + 2 k ds;  λ ← ∂/∂(d ⊙ k) ⊙ k + γ g − b dx s.
    """
    H, K = sizes[:2]
    eta, aware, low, high, _, moves = rule
    dfinal_precond, dprecond = ends
    dk, dbeta, dgamma = gradients
    W = lanes(d)
    for i in range(0, K, W):
        store_all(carry, i, load(dfinal_precond, job * K + i, K - i))
    for t in range(T - 1, -1, -1):
        row, at = first + t * H, t * wide
        b = beta[row] if aware else 1.0
        retention = gamma[row] if gamma.size else 1.0
        rate, dx = 0.0, 0.0
        if moves:
            ds_dot = energy(d, at, k, row * K, K)
            x = 1.0 - b * ds_dot
            rate = eta * b * x
            along_s, along_d = zeros(d), zeros(d)
            for i in range(0, K, W):
                key, di = load(k, row * K + i, K - i), load_all(d, at + i)
                u = moved(di, key, retention, rate)
                g = choose(u, low, high, 0.0, load_all(carry, i), 0.0)
                store_all(carry, i, g)
                along_s = fma(fma(g, key, 0.0), key, along_s)
                along_d = fma(g, di, along_d)
            gs = total(along_s)
            dx = eta * b * gs
            if gamma.size:
                dgamma[row] = total(along_d)
            if aware:
                dbeta[row] += eta * x * gs - dx * ds_dot
        for i in range(0, K, W):
            key, di, g = load(k, row * K + i, K - i), load_all(d, at + i), load_all(carry, i)
            dkw = load(dk, row * K + i, K - i)
            ds = fma(rate, g, fma(-b * dx, di, 0.0))
            store(dk, row * K + i, fma(fma(2.0, key, 0.0), ds, fma(dkw, di, 0.0)), K - i)
            g = fma(retention, g, fma(fma(-b * dx, key, 0.0), key, 0.0))
            store_all(carry, i, fma(dkw, key, g))
    for i in range(0, K, W):
        store(dprecond, job * K + i, load_all(carry, i), K - i)


@entry
def backward(jobs, bounds, sizes, rule, given, out):
    """The jobs from jobs[0] to jobs[1]: given (do, dfinal_state, dfinal_precond, q, k, beta, gamma,
    state, precond, e), out (dq, dk, dv, dbeta, dgamma, dstate, dprecond)."""
    H, K, V = sizes
    do, dfinal_state, dfinal_precond, q, k, beta, gamma, state, precond, e = given
    dq, dk, dv, dbeta, dgamma, dstate, dprecond = out
    W, scale = lanes(k), rule[4]
    S, w, r = scratch(k, max(K, V), W), scratch(k, 1, K), scratch(k, 1, K)
    memory, reads = (q, k, beta, e, do, dfinal_state), (k, beta, state, e, do)
    for job in range(jobs[0], jobs[1]):
        n, h = divmod(job, H)
        first, T = bounds[n] * H + h, bounds[n + 1] - bounds[n]
        d, wide = preconditioners(job, first, T, sizes, rule, k, beta, gamma, precond)
        for p in range(0, V, W):
            backward_memory(p, job, first, T, sizes, scale, d, wide, (S, w, r), memory,
                            (dk, dv, dbeta, dstate))  # fmt: skip
        backward_precond(job, first, T, sizes, rule, d, wide, r, k, beta, gamma,
                         (dfinal_precond, dprecond), (dk, dbeta, dgamma))  # fmt: skip
        for p in range(0, K, W):
            backward_reads(p, job, first, T, sizes, scale, d, wide, S, reads, (dq, dk, dv))
