"""The walk over whole sequences as machine code: which job, which block of tokens, which stage.

A job is one head of one sequence. Time goes in blocks, and within one from head to head, since the
rows of a token's heads lie side by side. In a block of a head the preconditioner comes first
(precond.py). Then the memory S (memory.py), cut into panels of as many columns as a vector has
lanes: columns of S never mix, so a panel (K × 128 bytes) stays in the first-level cache, and one
pass over it serves one token.

The backward wants e_t of what the forward knew; no state is kept or computed twice but S, once. d_t
is computed again by the forward's instructions, so that the clip mask is the forward's.

Arrays are flat and contiguous. Row r of q is q[r K : (r + 1) K] with r = token H + head; job
n H + h has the tokens from bounds[n] to bounds[n + 1]. `sizes` is (H, K, V), `rule` is (η,
beta_aware, d_min, d_max, scale, whether d moves). An array of size 0 stands for one that was not
given or is not wanted, a log α of None for no state decay.
"""

from osdn.ops.numba.memory import (
    backward_decay,
    backward_memory,
    backward_reads,
    forward_panel,
    retentions,
    retentions_like,
    transpose,
)
from osdn.ops.numba.precond import backward_precond, begin, preconditioners
from osdn.ops.numba.vectors import (
    BLOCK,
    entry,
    inlined,
    lanes,
    load_all,
    scratch,
    store,
)


@entry
def forward(jobs, bounds, sizes, rule, given, out):
    """The jobs from jobs[0] to jobs[1]: given (q, k, v, beta, log γ, log α), out (o, e, state,
    precond), of which the last two hold the start before and the end after."""
    # Scratch memory of this thread, once for all its jobs: S is a panel, d a block of rows.
    H, K, V = sizes
    q, k, v, beta, log_gamma, log_alpha = given
    o, e, state, precond = out
    W, moves, arrays = lanes(k), rule[5], (q, k, v, beta, o, e, state)
    S, w, d = scratch(k, K, W), scratch(k, 1, K), scratch(k, BLOCK + 1, K)
    alphas = retentions_like(log_alpha, k)
    wide = -(-K // W) * W if moves else 0  # of a row of d; 0: all tokens share the one row
    job = jobs[0]
    while job < jobs[1]:
        # All heads of one sequence that this thread has.
        n, h = divmod(job, H)
        stop = job + min(H - h, jobs[1] - job)
        # Blocks outside, heads inside: a block's rows are in the cache for all heads.
        for t in range(bounds[n], bounds[n + 1], BLOCK):
            T = min(BLOCK, bounds[n + 1] - t)
            for j in range(job, stop):
                # j holds n H already: row of token t, head j − n H
                first, at = (t - n) * H + j, j * K * V
                # States live in the outputs: the next block finds there what this one leaves.
                begin(d, 0, precond, j * K, K)
                # Stage 1: d of every token of the block, [T + 1, wide].
                if moves:
                    preconditioners(d, 0, first, T, sizes, rule, k, beta, log_gamma)
                retentions(alphas, log_alpha, first, T, H)
                # Stage 2: the memory, W columns at a time.
                for p in range(0, V, W):
                    forward_panel(p, at, at, first, T, sizes, rule[4], d, wide, alphas, S, w,
                                  arrays)  # fmt: skip
                # d after the block's last token.
                for i in range(0, K, W):
                    store(precond, j * K + i, load_all(d, T * wide + i), K - i)
        job = stop


@inlined
def backward_sequence(n, jobs, bounds, sizes, rule, given, out, scratches):
    """The jobs of sequence n: d for all tokens, the two reversed scans, then the reads."""
    H, K, V = sizes
    do, q, k, v, beta, log_gamma, log_alpha, state, precond, e, dlast = given
    dq, dk, dv, dbeta, dlog_gamma, dlog_alpha, dstate, dprecond = out
    G, w, r, alphas = scratches
    W, scale, moves = lanes(k), rule[4], rule[5]
    heads, begins, ends = jobs[1] - jobs[0], bounds[n], bounds[n + 1]
    # d of all tokens at once, T × K a head: the reversed scan needs it from the end.
    rows, panels = ends - begins + 1 if moves else 1, -(-K // W)
    wide, length = panels * W if moves else 0, rows * panels * W
    # [heads, rows, wide] and Sᵀ, [heads, panels, V, W]
    d, S = scratch(k, heads * rows, K), scratch(k, heads * panels * V, W)
    # The starts: d_1, and S_0 panel by panel.
    for j in range(jobs[0], jobs[1]):
        begin(d, (j - jobs[0]) * length, precond, j * K, K)
        for p in range(panels):
            transpose(S, ((j - jobs[0]) * panels + p) * V * W, state, j, p * W, K, V)
    # Stage 1 again, first token first: d_2 .. d_{T+1}.
    for t in range(begins, ends if moves else begins, BLOCK):
        for j in range(jobs[0], jobs[1]):
            at = (j - jobs[0]) * length + (t - begins) * wide
            first, T = (t - n) * H + j, min(BLOCK, ends - t)
            preconditioners(d, at, first, T, sizes, rule, k, beta, log_gamma)
    # The reversed scans, last block first: phase 2's over G, then phase 1's over λ.
    for t in range(begins + (ends - begins - 1) // BLOCK * BLOCK, begins - 1, -BLOCK):
        for j in range(jobs[0], jobs[1]):
            at = (j - jobs[0]) * length + (t - begins) * wide
            first, T = (t - n) * H + j, min(BLOCK, ends - t)
            retentions(alphas, log_alpha, first, T, H)
            for p in range(0, V, W):
                backward_memory(p, j, first, T, sizes, scale, d, at, wide, alphas, (G, w, r),
                                (q, k, beta, e, do), (dk, dv, dbeta, dstate))  # fmt: skip
            backward_precond(j, first, T, sizes, rule, d, at, wide, r, k, beta, log_gamma,
                             (dk, dbeta, dlog_gamma, dprecond))  # fmt: skip
    # The reads need S_t, so a last pass goes forward again, once dv is known.
    for t in range(begins, ends, BLOCK):
        # Last log α: a sum over what the passes above have found.
        for j in range(jobs[0], jobs[1]):
            at = (j - jobs[0]) * length + (t - begins) * wide
            first, T = (t - n) * H + j, min(BLOCK, ends - t)
            retentions(alphas, log_alpha, first, T, H)
            for p in range(panels):
                panel = ((j - jobs[0]) * panels + p) * V * W
                backward_reads(p * W, first, T, sizes, scale, d, at, wide, alphas, S, panel,
                               (k, beta, e, do), (dq, dk, dv))  # fmt: skip
    for j in range(jobs[0], jobs[1]):
        backward_decay(j, begins, ends, n, sizes, S, (j - jobs[0]) * panels * V * W, log_alpha,
                       (q, v, dq, dv, dlast), dlog_alpha)  # fmt: skip


@entry
def backward(jobs, bounds, sizes, rule, given, out):
    """The jobs from jobs[0] to jobs[1]: given (do, q, k, v, beta, log γ, log α, state, precond, e,
    the gradient of the final state), out (dq, dk, dv, dbeta, dlog γ, dlog α, dstate, dprecond), of
    which the last two hold the gradients of the final states before, and of the initial ones after.
    v and the gradient of the final state are used only with log α."""
    H, K = sizes[:2]
    k, log_alpha = given[2], given[6]
    # a panel of G, w, and r or λ
    rows = scratch(k, K, lanes(k)), scratch(k, 1, K), scratch(k, 1, K)
    scratches = (*rows, retentions_like(log_alpha, k))
    job = jobs[0]
    while job < jobs[1]:
        n, h = divmod(job, H)
        stop = job + min(H - h, jobs[1] - job)
        backward_sequence(n, (job, stop), bounds, sizes, rule, given, out, scratches)
        job = stop
