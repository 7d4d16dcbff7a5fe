"""The three experiments of `python -m theory`: what they run and measure, without drawing."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from osdn.ops import reference
from osdn.ops.operands import Options
from theory.bounds import precond_path, unit_key_bound
from theory.convergence import (
    diagonal_comparator,
    gap,
    gradient_descent_steps,
    hypergradient_descent,
    hypergradient_step,
    newton_step,
)
from theory.stability import log_growth

Tick = Callable[[], object]

FEATURES = ("aligned", "rotated")
KAPPAS = tuple(10.0**n for n in range(7))
GRADIENT, NEWTON = "gradient descent, best fixed step", "right-Newton"
# Name: (scalar, normalised), the options of hypergradient_step.
LEARNED = {
    "scalar, step η/L²": (True, False),
    "scalar, normalised step": (True, True),
    "diagonal, step η/L²": (False, False),
    "diagonal, normalised step": (False, True),
}
TOLERANCE, CAP, ROUND = 1e-12, 10_000, 100


class FullBatch(NamedTuple):
    """steps[features, method, κ]: median iterations to TOLERANCE, None past CAP.

    curves[features, method]: log10 φ_t/φ_1 at κ = 10.  bound: the same for Statement 9.
    residual: Statement 10's residual, features → κ → value.
    """

    steps: dict[tuple[str, str, float], int | None]
    curves: dict[tuple[str, str], Tensor]
    bound: Tensor
    residual: dict[tuple[str, float], float]


def full_batch(tick: Tick, *, seeds: int = 3, K: int = 16, V: int = 4) -> FullBatch:
    """Iterations to 1e-12 of each method, per condition number, with Σ diagonal or rotated.

    Eigenvalues log-spaced from 1 to 1/κ, E_1 standard normal, d_1 = 1/L = 1, η = 1.
    """
    g = torch.Generator().manual_seed(0)
    values = torch.stack([torch.logspace(0, -n, K, dtype=torch.float64) for n in range(7)])
    start = torch.randn(seeds, 1, K, V, generator=g, dtype=torch.float64).expand(-1, 7, -1, -1)
    normal = torch.randn(seeds, 7, K, K, generator=g, dtype=torch.float64)
    rotation = torch.linalg.qr(normal).Q
    steps: dict[tuple[str, str, float], int | None] = {}
    curves, residual = {}, {}
    one = torch.ones(K, dtype=torch.float64)
    for features in FEATURES:
        basis = rotation if features == "rotated" else torch.diag(one).expand_as(rotation)
        sigma = basis @ (values[:, :, None] * basis.mT)
        example = (sigma[0, 1], start[0, 1])
        best = one * 2 / (1 + values[1].min())
        curves[features, GRADIENT] = hypergradient_descent(*example, best, eta=0, steps=500).log_gap
        flat = sigma.flatten(0, 1), start.flatten(0, 1)
        counts = {GRADIENT: _count_gradient(values, (basis.mT @ start).square().sum(-1))}
        counts[NEWTON] = (gap(sigma, newton_step(sigma, start)) > TOLERANCE * gap(sigma, start)) + 1
        for method, (scalar, normalised) in LEARNED.items():
            count = _count(*flat, tick=tick, scalar=scalar, normalised=normalised)
            counts[method] = count.view(seeds, 7)
            curves[features, method] = hypergradient_descent(
                *example, one, eta=1, steps=500, scalar=scalar, normalised=normalised
            ).log_gap
        for method, count in counts.items():
            for kappa, median in zip(KAPPAS, count.median(0).values.tolist()):
                over = method in LEARNED and median > CAP
                steps[features, method, kappa] = None if over else median
        for kappa, matrix in zip(KAPPAS, sigma[0]):
            residual[features, kappa] = diagonal_comparator(matrix).residual
    curves = {key: curve / math.log(10) for key, curve in curves.items()}
    t = torch.arange(1, 501, dtype=torch.float64)
    budget = (1 - 1 / values[1]).square().sum()
    return FullBatch(steps, curves, t * (budget / t).log10(), residual)


def _count_gradient(values: Tensor, energy: Tensor) -> Tensor:
    """Iterations of gradient descent, [seeds, κ], from eigenvalues [κ, K], energy [seeds, κ, K]."""
    return torch.tensor(
        [[gradient_descent_steps(*pair, TOLERANCE) for pair in zip(values, x)] for x in energy]
    )


def _count(sigma: Tensor, error: Tensor, *, tick: Tick, scalar: bool, normalised: bool) -> Tensor:
    """Iterations until φ_t ≤ TOLERANCE φ_1 of each instance [N], CAP + 1 where there are more."""
    count = torch.full((sigma.shape[0],), CAP + 1)
    left = torch.arange(sigma.shape[0])
    d = error.new_ones(error.shape[:2])
    step = error.new_ones(error.shape[0])
    total = error.new_zeros(error.shape[0])
    target = math.log(TOLERANCE)
    for t in range(1, CAP + 1):
        error, log_ratio, d = hypergradient_step(
            sigma, error, d, step, normalised=normalised, scalar=scalar
        )
        total = total + log_ratio
        done = total <= target
        count[left[done & (count[left] > CAP)]] = t
        if t % ROUND == 0 or t < 10:
            # A finished instance may have reached φ = 0, where its ratio is 0/0: drop it.
            keep = count[left] > CAP
            left, sigma, error, d = left[keep], sigma[keep], error[keep], d[keep]
            step, total = step[keep], total[keep]
        if t % ROUND == 0:
            tick()
        if not len(left):
            break
    return count


class TokenLocal(NamedTuple):
    """log10 of Π x_t² over each prefix [T] and of its bound, by panel and η; and the table's rows.

    rows: (d_1, η, log10 Π x_t² at T, log10 of the bound, Σ x_t² over its bound).
    """

    curves: dict[tuple[str, float], tuple[Tensor, Tensor]]
    rows: list[tuple[str, float, float, float, float]]


ETAS = (0.1, 0.5, 1.0, 1.7)
PANELS = ("random keys, d₁ = 0", "random keys, d₁ = 1 + 0.3 ε", "keys chosen against d")


def token_local(tick: Tick, *, T: int = 512, K: int = 16) -> TokenLocal:
    """Measured Π x_t² against Statement 5 over η and d_1, for random keys and for the worst."""
    g = torch.Generator().manual_seed(1)
    random = normalize(torch.randn(T, K, generator=g, dtype=torch.float64), dim=-1)
    ones = torch.ones(K, dtype=torch.float64)
    near = 1 + 0.3 * torch.randn(K, generator=g, dtype=torch.float64)
    starts = {"0": 0 * ones, "1/2": ones / 2, "1 + 0.3 ε": near, "2": 2 * ones}
    curves, rows = {}, []
    for eta in ETAS:
        for name, d1 in starts.items():
            measured, bound = _prefixes(random, d1, eta)
            total = unit_key_bound(random, d1, eta=eta)
            share = (total.left / total.right).item()
            rows.append((name, eta, measured[-1].item(), bound[-1].item(), share))
            panel = {"0": PANELS[0], "1 + 0.3 ε": PANELS[1]}.get(name)
            if panel:
                curves[panel, eta] = measured, bound
        keys = hardest_keys(near, T, eta=eta)
        curves[PANELS[2], eta] = measured, bound = _prefixes(keys, near, eta)
        total = unit_key_bound(keys, near, eta=eta)
        share = (total.left / total.right).item()
        rows.append(("1 + 0.3 ε, worst keys", eta, measured[-1].item(), bound[-1].item(), share))
        tick()
    return TokenLocal(curves, rows)


def _prefixes(k: Tensor, d1: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """log10 of Π_{i ≤ t} x_i² and of (B/t)^t, for every t."""
    t = torch.arange(1, k.shape[0] + 1, dtype=torch.float64)
    budget = (d1 - 1).square().sum() / (eta * (2 - eta))
    x = precond_path(k, d1, eta=eta).x
    return x.square().log10().cumsum(0), t * (budget / t).log10()


def hardest_keys(d1: Tensor, T: int, *, eta: float) -> Tensor:
    """Unit keys [T, K] that keep Π x_t² near its bound: each takes 1/T of ‖d_1 − 1‖².

    Token t mixes the coordinates where d − 1 is largest and smallest so that its share of the
    identity of Statement 4, η(2 − η‖s‖²) x², is ‖d_1 − 1‖²/T; found by bisection. Needs d_1 − 1
    with both signs. Once no coordinate is large enough the largest one is taken.
    """
    error, keys = d1 - 1, []
    share = (error.square().sum() / T).item()
    rule = Options(eta, False, None, None, 1.0)
    for _ in range(T):
        high, low = int(error.argmax()), int(error.argmin())
        if -error[low] > error[high]:
            high, low = low, high
        p, n = error[high].item(), error[low].item()

        def spent(a: float, p: float = p, n: float = n) -> float:
            x = a * p + (1 - a) * n
            return eta * (2 - eta * (a * a + (1 - a) ** 2)) * x * x

        # x is zero at the start of the bracket and largest at its end, the one-hot key.
        start, end = (n / (n - p) if n * p < 0 else 0.0), 1.0
        for _ in range(60):
            middle = (start + end) / 2
            start, end = (middle, end) if spent(middle) < share else (start, middle)
        key = torch.zeros_like(error)
        key[high], key[low] = end**0.5, max(1 - end, 0.0) ** 0.5
        keys.append(key)
        error = reference.adapt(1 + error, key, error.new_ones(()), None, rule) - 1
    return torch.stack(keys)


SCENES = ("key axes jump", "value map drifts", "key norms jump", "write strength jumps")
GAMMAS, DRIFT_ETAS, BOXES = (1.0, 0.999, 0.99, 0.9), (0.1, 0.3, 1.0), (None, (0.0, 2.0))


class Drift(NamedTuple):
    """By (η, box, beta_aware): tensors [scene, γ] averaged over seeds (extremes over all).

    error: mean ‖e_t‖² over that of the plain delta rule.  x2: mean x_t².  low, high: extremes of d.
    growth: largest ‖M_T ··· M_1‖₂ over 64 tokens, one seed.
    """

    error: dict[tuple[float, tuple[float, float] | None, bool], Tensor]
    x2: dict[tuple[float, tuple[float, float] | None, bool], Tensor]
    extremes: dict[tuple[float, tuple[float, float] | None, bool], tuple[Tensor, Tensor]]
    growth: dict[tuple[float, tuple[float, float] | None, bool], Tensor]


def drift(tick: Tick, *, seeds: int = 8, T: int = 1024) -> Drift:
    """One memory learning a stream that changes every 128 tokens, with and without APF; d_1 = 1."""
    k, v, beta = streams(seeds, T)
    plain = _stream_error(k, v, beta, Options(0.0, False, None, None, 1.0), tick)[0][:, 0]
    result = Drift({}, {}, {}, {})
    for eta in DRIFT_ETAS:
        for box in BOXES:
            for beta_aware in (False, True):
                low, high = (None, None) if box is None else box
                rule = Options(eta, beta_aware, low, high, 1.0)
                key = (eta, box, beta_aware)
                error, x2, d = _stream_error(k, v, beta, rule, tick)
                result.error[key] = (error / plain[:, None]).mean(-1)
                result.x2[key] = x2.mean(-1)
                result.extremes[key] = d.amin((0, -1, -2)), d.amax((0, -1, -2))
                keys = k[:, None, 0, -64:].expand(-1, len(GAMMAS), -1, -1)
                last = d[-64:, :, :, 0].permute(1, 2, 0, 3)
                strength = beta[:, None, -64:].expand(keys.shape[:-1])
                result.growth[key] = log_growth(keys, last, strength).exp()
    return result


def streams(seeds: int, T: int, *, K: int = 16, V: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """k [scene, seeds, T, K], v [scene, seeds, T, V] and beta [scene, T] of the four scenes.

    Keys are Gaussian with standard deviations from 1 to 0.1 over the features, normalised; β is
    1/2; v = Wᵀk + 0.1 noise. In turn: the order of the features is redrawn every 128 tokens; the
    map W does a random walk; the keys' norm goes from 1 to 1/2 and back every 128 tokens; β goes
    from 0.8 to 0.4 and back.
    """
    g = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    spread = torch.logspace(0, -1, K, dtype=torch.float64)
    segments = T // 128
    order = torch.rand(seeds, segments, K, generator=g).argsort(-1)
    moving = spread[order].repeat_interleave(128, 1)
    noise = normal(seeds, T, K)
    k = torch.stack([normalize(noise * std, dim=-1) for std in (moving, spread, spread, spread)])
    half = torch.tensor([1.0, 0.5]).repeat(segments)[:segments].repeat_interleave(128)
    k[2] *= half[:, None]
    beta = torch.full((len(SCENES), T), 0.5, dtype=torch.float64)
    beta[3] = 0.8 * half
    W = normal(len(SCENES), seeds, 1, K, V).expand(-1, -1, T, -1, -1).clone()
    W[1] += 0.1 * normal(seeds, T, K, V).cumsum(1)
    v = torch.einsum("nstk,nstkv->nstv", k, W) + 0.1 * normal(len(SCENES), seeds, T, V)
    return k, v, beta


def _stream_error(
    k: Tensor, v: Tensor, strength: Tensor, rule: Options, tick: Tick
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ‖e_t‖² and mean x_t², [scene, γ, seeds], over t > 128, and d [T, scene, γ, seeds, K]."""
    scenes, seeds, T, K = k.shape
    shape = scenes, len(GAMMAS), seeds
    log_gamma = torch.tensor(GAMMAS, dtype=torch.float64).log()[:, None].expand(shape)
    S, d = k.new_zeros(*shape, K, v.shape[-1]), k.new_ones(*shape, K)
    errors, x2, path = k.new_zeros(shape), k.new_zeros(shape), []
    for t in range(T):
        beta = strength[:, None, None, t].expand(shape)
        b = beta if rule.beta_aware else 1.0
        key, value = k[:, None, :, t].expand(*shape, K), v[:, None, :, t]
        path.append(d)
        if t >= 128:
            errors += (value - torch.einsum("...kv,...k->...v", S, key)).square().sum(-1)
            x2 += (1 - b * (d * key * key).sum(-1)).square()
        S = reference.write(S, d, key, value, beta)
        d = reference.adapt(d, key, beta, log_gamma, rule)
    tick()
    return errors / (T - 128), x2 / (T - 128), torch.stack(path)
