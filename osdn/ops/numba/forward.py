"""The token recurrence as machine code for the CPU; see osdn.ops.numba.

A job is one head of one sequence. Time goes in blocks, and within one from head to head, since the
rows of a token's heads lie side by side. In a block of a head the preconditioner comes first, exact
clip included (docs/operator.md, phase 1). Then the memory S, cut into panels of as many columns as
a vector has lanes: columns of S never mix, so a panel (K × 128 bytes) stays in the first-level
cache, and one pass over it serves one token. With w_t = β_t d_t ⊙ k_t,

    S += w_{t−1} e_{t−1}ᵀ, and in the same pass Sᵀk_t and Sᵀq_{t−1}, whence e_t and o_{t−1}.

Arrays are flat and contiguous. Row r of q is q[r K : (r + 1) K] with r = token H + head; job
n H + h has the tokens from bounds[n] to bounds[n + 1]. `sizes` is (H, K, V), `rule` is (η,
beta_aware, d_min, d_max, scale, whether d moves); an array of size 0 stands for one that was not
given or is not wanted.
"""

import math

from osdn.ops.numba.vectors import (
    AHEAD,
    BLOCK,
    choose,
    entry,
    fetch,
    fma,
    inlined,
    lanes,
    load,
    load_all,
    scratch,
    spread,
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
        key = load(k, row + i, K - i)
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
def begin(d, at, precond, job, K):
    """The preconditioner of a job from its place among all to the row of d at `at`."""
    for i in range(0, K, lanes(d)):
        store_all(d, at + i, load(precond, job * K + i, K - i))


@inlined
def preconditioners(d, at, first, T, sizes, rule, k, beta, log_gamma):
    """d_2 .. d_{T+1} in the padded rows after d_1, which is at `at`; phase 1."""
    H, K = sizes[:2]
    eta, aware, low, high = rule[:4]
    W = lanes(d)
    wide = -(-K // W) * W
    for row in range(first, first + T * H, H):
        fetch(k, row + 2 * AHEAD * H, K, 0, K)
        b = beta[row] if aware else 1.0
        retention = retained(log_gamma, row)
        rate = eta * b * (1.0 - b * energy(d, at, k, row * K, K))
        for i in range(0, K, W):
            key = load(k, row * K + i, K - i)
            u = moved(load_all(d, at + i), key, retention, rate)
            store_all(d, at + wide + i, choose(u, low, high, low, u, high))
        at += wide


@inlined
def weigh(w, d, at, k, row, K, factor):
    """w = factor d_t ⊙ k_t."""
    for i in range(0, K, lanes(w)):
        key = load(k, row + i, K - i)
        store_all(w, i, fma(fma(factor, load_all(d, at + i), 0.0), key, 0.0))


@inlined
def forward_panel(p, job, first, T, sizes, scale, d, wide, S, w, arrays):
    """o, e and the memory in columns p and following of the values; d_t is at t wide."""
    H, K, V = sizes
    q, k, v, beta, o, errors, state = arrays
    W, count = lanes(S), V - p
    for i in range(K):
        store_all(S, i * W, load(state, (job * K + i) * V + p, count))
        w[i] = 0
    e = zeros(S)
    for t in range(T + 1):
        row, last = first + min(t, T - 1) * H, first + max(t - 1, 0) * H
        ahead = row + AHEAD * H
        fetch(q, ahead, K, 0, K)
        fetch(k, ahead, K, 0, K)
        fetch(v, ahead, V, p, W)
        fetch(o, ahead, V, p, W)
        if errors.size:
            fetch(errors, ahead, V, p, W)
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
        store(state, (job * K + i) * V + p, load_all(S, i * W), count)


@entry
def forward(jobs, bounds, sizes, rule, given, out):
    """The jobs from jobs[0] to jobs[1]: given (q, k, v, beta, log γ), out (o, e, state, precond),
    of which the last two hold the start before and the end after."""
    H, K, V = sizes
    q, k, v, beta, log_gamma = given
    o, e, state, precond = out
    W, moves, arrays = lanes(k), rule[5], (q, k, v, beta, o, e, state)
    S, w, d = scratch(k, K, W), scratch(k, 1, K), scratch(k, BLOCK + 1, K)
    wide = -(-K // W) * W if moves else 0
    job = jobs[0]
    while job < jobs[1]:
        n, h = divmod(job, H)
        stop = job + min(H - h, jobs[1] - job)
        for t in range(bounds[n], bounds[n + 1], BLOCK):
            T = min(BLOCK, bounds[n + 1] - t)
            for j in range(job, stop):
                first = (t - n) * H + j
                begin(d, 0, precond, j, K)
                if moves:
                    preconditioners(d, 0, first, T, sizes, rule, k, beta, log_gamma)
                for p in range(0, V, W):
                    forward_panel(p, j, first, T, sizes, rule[4], d, wide, S, w, arrays)
                for i in range(0, K, W):
                    store(precond, j * K + i, load_all(d, T * wide + i), K - i)
        job = stop
