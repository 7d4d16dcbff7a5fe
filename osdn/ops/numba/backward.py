"""The derivative of the token recurrence as machine code; the layout is compiled_forward.py's.

Of what the forward knew it wants e_t alone; no state is kept or computed twice but S, once. d_t is
computed again by the forward's instructions, so that the clip mask is the forward's. Then, with G
the gradient of S, which needs e but not S, two passes a token:

    last token first over G:    G += scale q_t do_tᵀ − k_{t+1} de_{t+1}ᵀ, with a = Gᵀ(d_t ⊙ k_t) and
                                G e_t;  dv = de = β a,  dβ = ⟨a, e⟩,  ∂/∂(d ⊙ k) = β G e
    first token first over Sᵀ:  dq = scale S_t do,  dk −= S_{t−1} de,  S += w_t e_tᵀ

and between them phase 1 reversed.
"""

from osdn.ops.numba.forward import begin, energy, moved, preconditioners, retained, weigh
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
def backward_memory(p, job, first, T, sizes, scale, d, at, wide, scratches, arrays, gradients):
    """Over G, last token first: dv, this panel's share of dβ and of ∂/∂(d ⊙ k), left in dk."""
    H, K, V = sizes
    q, k, beta, errors, do = arrays
    dk, dv, dbeta, dstate = gradients
    G, w, r = scratches
    W, count = lanes(G), V - p
    for i in range(K):
        store_all(G, i * W, load(dstate, (job * K + i) * V + p, count))
    de, after = zeros(G), first + (T - 1) * H
    for t in range(T - 1, -1, -1):
        row = first + t * H
        ahead = row - AHEAD * H
        fetch(q, ahead, K, 0, K)
        fetch(k, ahead, K, 0, K)
        fetch(dk, ahead, K, 0, K)
        fetch(errors, ahead, V, p, W)
        fetch(do, ahead, V, p, W)
        fetch(dv, ahead, V, p, W)
        weigh(w, d, at + t * wide, k, row * K, K, 1.0)
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
def transpose(S, at, state, job, p, K, V):
    """Sᵀ of a job in columns p and following of the keys: V vectors from S[at] on."""
    W = lanes(S)
    for j in range(V):
        for i in range(W):
            S[at + j * W + i] = state[(job * K + p + i) * V + j] if p + i < K else 0


@inlined
def backward_reads(p, first, T, sizes, scale, d, at, wide, S, panel, arrays, gradients):
    """Over Sᵀ at S[panel], first token first, for columns p and following of the keys: dq, and
    dk −= S_{t−1} de."""
    H, K, V = sizes
    k, beta, errors, do = arrays
    dq, dk, dv = gradients
    W, count = lanes(S), K - p
    for t in range(T):
        row = first + t * H
        ahead = row + AHEAD * H
        fetch(k, ahead, K, p, W)
        fetch(dq, ahead, K, p, W)
        fetch(dk, ahead, K, p, W)
        fetch(dv, ahead, V, 0, V)
        fetch(errors, ahead, V, 0, V)
        fetch(do, ahead, V, 0, V)
        key = load(k, row * K + p, count)
        w = fma(fma(beta[row], load_all(d, at + t * wide + p), 0.0), key, 0.0)
        a, b = zeros(S), zeros(S)
        for j in range(V):
            s = load_all(S, panel + j * W)
            a = fma(spread(dv, row * V + j), s, a)
            s = fma(spread(errors, row * V + j), w, s)
            store_all(S, panel + j * W, s)
            b = fma(spread(do, row * V + j), s, b)
        store(dq, row * K + p, fma(scale, b, 0.0), count)
        store(dk, row * K + p, fma(-1.0, a, load(dk, row * K + p, count)), count)


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
    begin(carry, 0, dprecond, job, K)
    at += T * wide
    for row in range(first + (T - 1) * H, first - 1, -H):
        at -= wide
        fetch(k, row - 2 * AHEAD * H, K, 0, K)
        fetch(dk, row - 2 * AHEAD * H, K, 0, K)
        b = beta[row] if aware else 1.0
        retention = retained(log_gamma, row)
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
            if log_gamma.size:
                dlog_gamma[row] = retention * total(along_d)
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


@inlined
def backward_sequence(n, jobs, bounds, sizes, rule, given, out, scratches):
    """The jobs of sequence n: d for all tokens, the two reversed scans, then the reads."""
    H, K, V = sizes
    do, q, k, beta, log_gamma, state, precond, e = given
    dq, dk, dv, dbeta, dlog_gamma, dstate, dprecond = out
    G, w, r = scratches
    W, scale, moves = lanes(k), rule[4], rule[5]
    heads, begins, ends = jobs[1] - jobs[0], bounds[n], bounds[n + 1]
    rows, panels = ends - begins + 1 if moves else 1, -(-K // W)
    wide, length = panels * W if moves else 0, rows * panels * W
    d, S = scratch(k, heads * rows, K), scratch(k, heads * panels * V, W)
    for j in range(jobs[0], jobs[1]):
        begin(d, (j - jobs[0]) * length, precond, j, K)
        for p in range(panels):
            transpose(S, ((j - jobs[0]) * panels + p) * V * W, state, j, p * W, K, V)
    for t in range(begins, ends if moves else begins, BLOCK):
        for j in range(jobs[0], jobs[1]):
            at = (j - jobs[0]) * length + (t - begins) * wide
            first, T = (t - n) * H + j, min(BLOCK, ends - t)
            preconditioners(d, at, first, T, sizes, rule, k, beta, log_gamma)
    for t in range(begins + (ends - begins - 1) // BLOCK * BLOCK, begins - 1, -BLOCK):
        for j in range(jobs[0], jobs[1]):
            at = (j - jobs[0]) * length + (t - begins) * wide
            first, T = (t - n) * H + j, min(BLOCK, ends - t)
            for p in range(0, V, W):
                backward_memory(p, j, first, T, sizes, scale, d, at, wide, (G, w, r),
                                (q, k, beta, e, do), (dk, dv, dbeta, dstate))  # fmt: skip
            backward_precond(j, first, T, sizes, rule, d, at, wide, r, k, beta, log_gamma,
                             (dk, dbeta, dlog_gamma, dprecond))  # fmt: skip
    for t in range(begins, ends, BLOCK):
        for j in range(jobs[0], jobs[1]):
            at = (j - jobs[0]) * length + (t - begins) * wide
            first, T = (t - n) * H + j, min(BLOCK, ends - t)
            for p in range(panels):
                panel = ((j - jobs[0]) * panels + p) * V * W
                backward_reads(p * W, first, T, sizes, scale, d, at, wide, S, panel,
                               (k, beta, e, do), (dq, dk, dv))  # fmt: skip


@entry
def backward(jobs, bounds, sizes, rule, given, out):
    """The jobs from jobs[0] to jobs[1]: given (do, q, k, beta, log γ, state, precond, e), out
    (dq, dk, dv, dbeta, dlog γ, dstate, dprecond), of which the last two hold the gradients of the
    final states before, and of the initial ones after."""
    H, K = sizes[:2]
    k = given[2]
    scratches = scratch(k, K, lanes(k)), scratch(k, 1, K), scratch(k, 1, K)
    job = jobs[0]
    while job < jobs[1]:
        n, h = divmod(job, H)
        stop = job + min(H - h, jobs[1] - job)
        backward_sequence(n, (job, stop), bounds, sizes, rule, given, out, scratches)
        job = stop
