"""What an OSDN layer makes of a row of projections, for one token: compiled for the CPU.

The convolutions with their histories, the unit norms and the gates, in one call for all sequences
and heads; the same equations as osdn/ops/triton/layer_step.py, whose remaining part is the step.
"""

import math

import numpy as np

from osdn.ops.numba.vectors import entry, inlined


@inlined
def convolved(x, row, there, history, at, weight, channel, gap):
    """silu(Σ_j w_j x_j) of one channel; its history moves on by one."""
    own = row[x] if there else row[x] * 0  # 0 times it, for the row's dtype
    u = own * weight[channel * (gap + 1) + gap]
    # history [gap] holds the latest input last, so weight j meets input j.
    for j in range(gap):
        u += history[at + j] * weight[channel * (gap + 1) + j]
    if there and gap > 0:  # padding is not kept
        # The window moves on by one token.
        for j in range(gap - 1):
            history[at + j] = history[at + j + 1]
        history[at + gap - 1] = own
    return u / (1 + np.exp(-u))


@entry
def layer_inputs(rows, mask, qk_history, v_history, weights, bias, decay, eps, double, out):
    """rows [B, N] as `layer_step` takes them, histories flat; out (q, k [B, H, K], v [B, H, V],
    β, log γ, log α [B, H]); bias has no elements without forgetting, and the two of decay, A_log
    and dt_bias, none without a decay of the state."""
    q, k, v, beta, log_gamma, log_alpha = out
    A_log, dt_bias = decay
    (B, H, K), V = q.shape, v.shape[2]
    gap = weights[0].size // (H * K) - 1  # the width of the convolution less one
    for b in range(B):
        row, there = rows[b], mask[b] != 0
        for h in range(H):
            # q then k: each head is convolved, then scaled to a unit vector.
            for part in range(2):
                target, weight = (q, weights[0]) if part == 0 else (k, weights[1])
                total = row[0] * 0
                for i in range(K):
                    # Histories are [B, 2, H K, gap]: q's channels, then k's.
                    channel = h * K + i
                    at = ((b * 2 + part) * H * K + channel) * gap
                    z = convolved(
                        part * H * K + channel, row, there, qk_history, at, weight, channel, gap
                    )
                    target[b, h, i] = z
                    total += z * z
                inverse = 1 / math.sqrt(total + eps)
                for i in range(K):
                    target[b, h, i] *= inverse
            for i in range(V):
                channel = h * V + i
                at = (b * H * V + channel) * gap
                v[b, h, i] = convolved(
                    2 * H * K + channel, row, there, v_history, at, weights[2], channel, gap
                )
            # A row is q, k, v, then H columns of each gate: β's, with forgetting γ's, then α's.
            column = H * (2 * K + V) + h
            beta[b, h] = (2 if double else 1) / (1 + math.exp(-row[column]))
            if bias.size:
                column += H
                c = row[column] + bias[h]
                # logsigmoid(c), stable for either sign of c.
                log_gamma[b, h] = min(c, 0) - math.log1p(math.exp(-abs(c)))
            if A_log.size:
                a = row[column + H] + dt_bias[h]
                softplus = max(a, 0) + math.log1p(math.exp(-abs(a)))
                log_alpha[b, h] = -math.exp(A_log[h]) * softplus
            # Padding: such a token changes neither S nor d.
            if not there:
                k[b, h, :] = 0
                beta[b, h] = 0
                log_gamma[b, h] = 0
                log_alpha[b, h] = 0
