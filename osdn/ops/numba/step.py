"""One token of every row as machine code, for decoding; arrays as in osdn.ops.numba.walk."""

from osdn.ops.numba.memory import forward_panel, retentions, retentions_like
from osdn.ops.numba.precond import begin, preconditioners
from osdn.ops.numba.vectors import (
    entry,
    lanes,
    load_all,
    scratch,
    store,
)


@entry
def step(jobs, sizes, rule, given, out, places):
    """The jobs from jobs[0] to jobs[1], job b H + h being head h of row b.

    given: (q, k, v, beta, log γ, log α).  out: (o, state, precond), two flat views that hold a
    pool.  places: (read, write, stride of state, stride of precond): where in the pool each row
    finds its memory and leaves it; where either is negative, nothing happens.
    """
    H, K, V = sizes
    q, k, v, beta, log_gamma, log_alpha = given
    o, state, precond = out
    read, write, state_stride, precond_stride = places
    W, moves = lanes(k), rule[5]
    # d_1 and d_2 are all there is, so two rows.
    S, w, d = scratch(k, K, W), scratch(k, 1, K), scratch(k, 2, K)
    # No residuals are kept: an array of size 0 tells the panel so.
    none, alphas = o[:0], retentions_like(log_alpha, k)
    wide = -(-K // W) * W if moves else 0
    for job in range(jobs[0], jobs[1]):
        b, h = divmod(job, H)
        # An empty row of a batch of fixed size.
        if read[b] < 0 or write[b] < 0:
            continue
        # The same code as a block of one token: decoding gives the forward's bits.
        begin(d, 0, precond, read[b] * precond_stride + h * K, K)
        if moves:
            # Row `job` of q, k and v, since T = 1
            preconditioners(d, 0, job, 1, sizes, rule, k, beta, log_gamma)
        retentions(alphas, log_alpha, job, 1, H)
        source = read[b] * state_stride + h * K * V
        target = write[b] * state_stride + h * K * V
        for p in range(0, V, W):
            forward_panel(p, source, target, job, 1, sizes, rule[4], d, wide, alphas, S, w,
                          (q, k, v, beta, o, none, state))  # fmt: skip
        for i in range(0, K, W):
            at = write[b] * precond_stride + h * K + i
            store(precond, at, load_all(d, wide + i), K - i)
