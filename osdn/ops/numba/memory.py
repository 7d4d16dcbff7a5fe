"""Phase 2 as machine code: the memory of one head in panels of W columns, and its gradient.

With w_t = β_t d_t ⊙ k_t and S̃_t = α_t S_{t−1}, forward in one pass over a panel per token:

    S_{t−1} = S̃_{t−1} + w_{t−1} e_{t−1}ᵀ, whence o_{t−1} = scale Sᵀ q_{t−1} and e_t = v_t − S̃_tᵀ k_t

Backward, with G the gradient of S, which needs e but not S, two passes a token:

    last token first over G:    G ← α_{t+1} (G − k_{t+1} de_{t+1}ᵀ) + scale q_t do_tᵀ, with
                                a = Gᵀ(d_t ⊙ k_t) and G e_t;
                                dv = de = β a,  dβ = ⟨a, e⟩,  ∂/∂(d ⊙ k) = β G e
    first token first over Sᵀ:  dq = scale S_t do,  dk −= S̃_t de,  S_t = S̃_t + w_t e_tᵀ

Arrays and `sizes` are those of osdn.ops.numba.walk. An α of None is 1: numba then compiles the
kernels without it.
"""

import math

from osdn.ops.numba.vectors import (
    AHEAD,
    BLOCK,
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
def retentions(alphas, log_alpha, first, T, H):
    """α of tokens 0..T−1 of a block, and 1 for token T, which the block does not have."""
    if log_alpha is None:
        return
    for t in range(T):
        alphas[t] = math.exp(log_alpha[first + t * H])
    # Read by the backward, whose step at T − 1 decays by the α after it.
    alphas[T] = 1


@inlined
def retentions_like(log_alpha, like):
    """Room for `retentions`; None where the memory does not decay."""
    if log_alpha is None:
        return None
    return scratch(like, 1, BLOCK + 1)


@inlined
def retention(alphas, t):
    """α of a token, or None, which numba knows when it compiles: then `decayed` costs nothing."""
    if alphas is None:
        return None
    return alphas[t]


@inlined
def decayed(s, alpha):
    """α s; s where the memory does not decay."""
    if alpha is None:
        return s
    return fma(alpha, s, 0.0)


@inlined
def weigh(w, d, at, k, row, K, factor):
    """w = factor d_t ⊙ k_t."""
    for i in range(0, K, lanes(w)):
        key = load(k, row + i, K - i)
        store_all(w, i, fma(fma(factor, load_all(d, at + i), 0.0), key, 0.0))


@inlined
def forward_panel(p, source, target, first, T, sizes, scale, d, wide, alphas, S, w, arrays):
    """o, e and the memory in columns p and following of the values; d_t is at t wide.

    The head's memory is read at `source` in the state and written at `target`.
    """
    H, K, V = sizes
    q, k, v, beta, o, errors, state = arrays
    # count < W only in the last panel, whose other lanes stay zero.
    W, count = lanes(S), V - p
    # The panel in one contiguous block [K, W], which stays in the first-level cache.
    for i in range(K):
        store_all(S, i * W, load(state, source + i * V + p, count))
        w[i] = 0  # token −1 writes nothing
    e = zeros(S)
    # T tokens take T + 1 passes: each pass finishes the token before and begins its own.
    for t in range(T + 1):
        # At both ends one of the two does not exist; a row that does is read, and not used.
        row, last = first + min(t, T - 1) * H, first + max(t - 1, 0) * H
        ahead = row + AHEAD * H
        # A token's rows lie H rows apart, too far for the processor to guess the next.
        fetch(q, ahead, K, 0, K)
        fetch(k, ahead, K, 0, K)
        fetch(v, ahead, V, p, W)
        fetch(o, ahead, V, p, W)
        if errors.size:
            fetch(errors, ahead, V, p, W)
        alpha = retention(alphas, t)
        a, b = zeros(S), zeros(S)  # S̃_tᵀ k_t and S_{t−1}ᵀ q_{t−1}, W of the V columns
        for i in range(K):
            # One load and one store of S serve a write, a decay and two reads.
            s = fma(spread(w, i), e, load_all(S, i * W))  # row i of S_{t−1}, W columns
            b = fma(spread(q, last * K + i), s, b)
            # Only now: token t's decay comes after token t − 1's read.
            s = decayed(s, alpha)
            store_all(S, i * W, s)
            a = fma(spread(k, row * K + i), s, a)
        # Only now is S_{t−1}ᵀ q_{t−1} whole.
        if t > 0:
            store(o, last * V + p, fma(scale, b, 0.0), count)
        if t < T:
            e = fma(-1.0, a, load(v, row * V + p, count))  # e_t, W of the V columns
            if errors.size:
                store(errors, row * V + p, e, count)
            # w_t by d_t, to be written in the next pass.
            weigh(w, d, t * wide, k, row * K, K, beta[row])
    # The last token was written in the extra pass.
    for i in range(K):
        store(state, target + i * V + p, load_all(S, i * W), count)


@inlined
def backward_memory(p, job, first, T, sizes, scale, d, at, wide, alphas, scratches, arrays,
                    gradients):  # fmt: skip
    """Over G, last token first: dv, this panel's share of dβ and of ∂/∂(d ⊙ k), left in dk."""
    H, K, V = sizes
    q, k, beta, errors, do = arrays
    dk, dv, dbeta, dstate = gradients
    G, w, r = scratches
    # G [K, W], the gradient of S in columns p and following.
    W, count = lanes(G), V - p
    for i in range(K):
        store_all(G, i * W, load(dstate, (job * K + i) * V + p, count))
    # The erase of the token after, −k_{t+1} de_{t+1}ᵀ, is taken in the pass of token t.
    de, after = zeros(G), first + (T - 1) * H
    for t in range(T - 1, -1, -1):
        row = first + t * H
        # Ahead is earlier here.
        ahead = row - AHEAD * H
        fetch(q, ahead, K, 0, K)
        fetch(k, ahead, K, 0, K)
        fetch(dk, ahead, K, 0, K)
        fetch(errors, ahead, V, p, W)
        fetch(do, ahead, V, p, W)
        fetch(dv, ahead, V, p, W)
        # d_t ⊙ k_t, [K]: β is left out, since dβ needs ⟨a, e⟩ without it
        weigh(w, d, at + t * wide, k, row * K, K, 1.0)
        e = load(errors, row * V + p, count)  # e_t, [W]
        read = fma(scale, load(do, row * V + p, count), 0.0)  # scale do_t, [W]
        # Of the token after: the erase of t + 1 was of the decayed memory.
        alpha = retention(alphas, t + 1)
        a = zeros(G)  # Gᵀ(d_t ⊙ k_t), W of the V columns
        for i in range(K):
            g = fma(spread(k, after * K + i), de, load_all(G, i * W))  # row i, W columns
            g = decayed(g, alpha)
            g = fma(spread(q, row * K + i), read, g)
            store_all(G, i * W, g)
            # Two reductions of the same row: over K into a, over V into r.
            a = fma(spread(w, i), g, a)
            r[i] = total(fma(g, e, 0.0))  # (G e_t)_i, this panel's columns
        de, after = fma(-beta[row], a, 0.0), row  # −de_t, [W]
        # de = dv = β a: v enters e with the factor 1.
        store(dv, row * V + p, fma(beta[row], a, 0.0), count)
        # The first panel sets, the others add: nobody clears the output before.
        dbeta[row] = (dbeta[row] if p else 0) + total(fma(a, e, 0.0))
        # Likewise β G e_t, [K]: phase 1's reverse scan will turn it into dk.
        for i in range(0, K, W):
            share = load(dk, row * K + i, K - i) if p else zeros(G)
            store(dk, row * K + i, fma(beta[row], load_all(r, i), share), K - i)
    # The first token's erase and decay are still due; then G is that of the state before.
    alpha = retention(alphas, 0)
    for i in range(K):
        g = fma(spread(k, after * K + i), de, load_all(G, i * W))
        g = decayed(g, alpha)
        store(dstate, (job * K + i) * V + p, g, count)


@inlined
def transpose(S, at, state, job, p, K, V):
    """Sᵀ of a job in columns p and following of the keys: V vectors from S[at] on."""
    W = lanes(S)
    for j in range(V):
        for i in range(W):
            # A panel of Sᵀ is V vectors of W features, zeros where K ends.
            S[at + j * W + i] = state[(job * K + p + i) * V + j] if p + i < K else 0


@inlined
def backward_reads(p, first, T, sizes, scale, d, at, wide, alphas, S, panel, arrays,
                   gradients):  # fmt: skip
    """Over Sᵀ at S[panel], first token first, for columns p and following of the keys: dq, and
    dk −= S̃_t de."""
    H, K, V = sizes
    k, beta, errors, do = arrays
    dq, dk, dv = gradients
    # The panel is cut along K here, since dq and dk are sums over V.
    W, count = lanes(S), K - p
    for t in range(T):
        row = first + t * H
        # S is computed forward again, from the residuals: no state was kept.
        ahead = row + AHEAD * H
        fetch(k, ahead, K, p, W)
        fetch(dq, ahead, K, p, W)
        fetch(dk, ahead, K, p, W)
        fetch(dv, ahead, V, 0, V)
        fetch(errors, ahead, V, 0, V)
        fetch(do, ahead, V, 0, V)
        key = load(k, row * K + p, count)
        # w_t, W of the K features
        w = fma(fma(beta[row], load_all(d, at + t * wide + p), 0.0), key, 0.0)
        alpha = retention(alphas, t)
        a, b = zeros(S), zeros(S)  # S̃_t de_t and S_t do_t, W of the K features
        for j in range(V):
            s = decayed(load_all(S, panel + j * W), alpha)  # column j of S̃_t, W features
            a = fma(spread(dv, row * V + j), s, a)
            # S_t, before do reads it, since o reads after the write.
            s = fma(spread(errors, row * V + j), w, s)
            store_all(S, panel + j * W, s)
            b = fma(spread(do, row * V + j), s, b)
        store(dq, row * K + p, fma(scale, b, 0.0), count)  # scale S_t do_t
        # Joins what phase 1 left there.
        store(dk, row * K + p, fma(-1.0, a, load(dk, row * K + p, count)), count)


@inlined
def dot(x, y, at, count):
    """⟨x, y⟩ of a row of `count` numbers that begins at `at` in both."""
    products = zeros(x)
    for i in range(0, count, lanes(x)):
        products = fma(load(x, at + i, count - i), load(y, at + i, count - i), products)
    return total(products)


@inlined
def last_overlap(S, at, dlast, job, K, V):
    """⟨S_T, ∂/∂S_T⟩ of a job, whose Sᵀ lies at S[at] as `transpose` lays it."""
    W, overlap = lanes(S), 0.0
    for i in range(K):
        # Feature i lies in lane i % W of panel i // W.
        panel = at + i // W * V * W + i % W
        for j in range(V):
            overlap += S[panel + j * W] * dlast[(job * K + i) * V + j]
    return overlap


@inlined
def backward_decay(job, begins, ends, n, sizes, S, at, log_alpha, arrays, dlog_alpha):
    """d log α_t = F_t = ⟨S̃_t, ∂/∂S̃_t⟩, last token first: F_t = F_{t+1} + ⟨q, dq⟩ − ⟨v, dv⟩.

    From ⟨S_t, ∂/∂S_t⟩ = F_{t+1} + ⟨o_t, do_t⟩ and = F_t + ⟨S̃_tᵀ k_t, de_t⟩ + ⟨e_t, de_t⟩, where
    S̃_tᵀ k_t + e_t = v_t, de_t = dv_t and ⟨o_t, do_t⟩ = ⟨q_t, dq_t⟩. Summed in float64; 0 at a hard
    reset, which nothing passes.
    """
    if log_alpha is None:
        return
    H, K, V = sizes
    q, v, dq, dv, dlast = arrays
    F = last_overlap(S, at, dlast, job, K, V)  # [scalar] ⟨S_T, ∂/∂S_T⟩, where the sequence ends
    # As in walk: job n H + h has its token t in row t H + h.
    first = (begins - n) * H + job
    # In float64, since F is a small rest of large terms that cancel.
    for row in range(first + (ends - begins - 1) * H, first - 1, -H):
        F += float(dot(q, dq, row * K, K)) - float(dot(v, dv, row * V, V))
        if math.exp(log_alpha[row]) == 0:
            F = 0.0
        dlog_alpha[row] = F
