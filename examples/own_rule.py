"""Try a rule of your own for d on MQAR: no kernel, no backward pass, no change to the library.

    python examples/own_rule.py --seeds 21 22 23 24 --rules OSDN "normalised step"

Write a class like those below, give it a line in RULES, and compare it with OSDN on the task of
`apf_again` (study/recipes/mqar_cpu.yaml: 32 pairs in a 16 × 16 memory), seed by seed, on a CPU. A
run takes half a minute of one core; finished ones are kept in --out and are not made again until
their rule changes. Fields of the task are changed like mqar.apf_again.train.epochs=5.
"""

import argparse
import inspect
import json
import multiprocessing
from hashlib import sha256
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import solve_triangular
from tqdm import tqdm

from osdn.errors import UserError
from osdn.evals.mqar.grid import train_model
from osdn.evals.mqar.recipe import Cell
from osdn.evals.results import markdown
from osdn.layers.osdn import OSDN
from study.plan import load_study
from study.records import append
from study.statistics import signed

STUDY = Path(__file__).parents[1] / "study" / "recipes" / "mqar_cpu.yaml"
EXPERIMENT = "apf_again"


class OwnRule(OSDN):
    """OSDN without a box on whole rows that start from an empty memory, under plain autograd.

    With z_t = b_t k_t ⊙ k_t and G_tj = γ_{j+1} ··· γ_{t−1} for j < t, else 0, both phases are
    triangular systems of the row's T tokens:

        x_t = 1 − ⟨d_t, z_t⟩                  d_t = base_t + Σ_j G_tj η_j x_j z_j
        e_t = v_t − Σ_{j<t} ⟨k_t, w_j⟩ e_j    w_t = β_t d_t ⊙ k_t
        o_t = scale · Σ_{j≤t} ⟨q_t, w_j⟩ e_j

    A subclass changes η_t (`step`) or where d is without learning (`base`).
    """

    def __init__(self, hidden_size: int, num_heads: int, **options: Any):
        super().__init__(hidden_size, num_heads, **options)
        if self.rule.get("precond_min") is not None or self.g_proj is not None:
            raise ValueError("OwnRule: expected no box and no output gate; whole rows have neither")

    def step(self, hidden_states: Tensor, s: Tensor) -> Tensor:
        """η_t, broadcast to [B, T, H], of the layer's input [B, T, D] and s [B, T, H, K]."""
        return torch.full_like(s[..., 0], self.rule["eta"])

    def base(self, d: Tensor, Gamma: Tensor) -> Tensor:
        """base_t [B, H, T, K] of d_1 [H, 1, K] and Γ_t = γ_1 ··· γ_{t−1} [B, H, T, 1]."""
        return Gamma * d

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """[B, T, D] -> ([B, T, D], None, None); no cache, no padding, no packing."""
        q, k, v, beta, log_gamma = self.operands(hidden_states)[:5]
        eta = self.step(hidden_states, k * k).expand_as(beta)
        log_gamma = torch.zeros_like(beta) if log_gamma is None else log_gamma
        tensors = (q, k, v, beta, log_gamma, eta)
        q, k, v, beta, log_gamma, eta = (x.transpose(1, 2).to(q.dtype) for x in tensors)
        post = log_gamma.cumsum(-1)
        pre = post - log_gamma
        past = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device).tril(-1)
        G = (pre[..., :, None] - post[..., None, :]).masked_fill(~past, -torch.inf).exp()

        z = k * k * (beta[..., None] if self.rule["beta_aware"] else 1)
        d_1 = torch.ones_like(k[0, :, :1]) if (d := self.start_precond()) is None else d[:, None]
        base = self.base(d_1, pre.exp()[..., None]).expand_as(k)
        W = G * eta[..., None, :]
        x = solve(W * (z @ z.mT), 1 - (base * z).sum(-1, keepdim=True))
        d = base + W @ (x * z)

        w = beta[..., None] * d * k
        e = solve((k @ w.mT).masked_fill(~past, 0), v)
        o = self.head_dim**-0.5 * (q @ w.mT).tril() @ e
        return self.o_proj(self.o_norm(o.transpose(1, 2)).flatten(-2)), None, None


def solve(strictly_lower: Tensor, right: Tensor) -> Tensor:
    """(I + L)⁻¹ right."""
    return solve_triangular(strictly_lower, right, upper=False, unitriangular=True)


class Normalised(OwnRule):
    """A step that no key's spread decides: η_t = η / ‖s_t‖² (of unit keys ‖s‖² is 1/K to 1)."""

    def step(self, hidden_states: Tensor, s: Tensor) -> Tensor:
        return self.rule["eta"] / (s * s).sum(-1).clamp_min(1e-6)


class TowardsStart(OwnRule):
    """What is forgotten is what was learned: d falls back to d_1, where APF's falls to 0."""

    def base(self, d: Tensor, Gamma: Tensor) -> Tensor:
        return d


class NormalisedTowardsStart(Normalised, TowardsStart):
    """Both."""


class HeadStep(OwnRule):
    """A learned η for each head, in (0, 2), from 1."""

    def __init__(self, hidden_size: int, num_heads: int, **options: Any):
        super().__init__(hidden_size, num_heads, **options)
        self.logit = nn.Parameter(torch.zeros(num_heads))

    def step(self, hidden_states: Tensor, s: Tensor) -> Tensor:
        return 2 * self.logit.sigmoid()


class TokenStep(OwnRule):
    """η_t = 2 sigmoid(W x_t + b) for each head, from 1: the layer says what d learns from."""

    def __init__(self, hidden_size: int, num_heads: int, **options: Any):
        super().__init__(hidden_size, num_heads, **options)
        self.eta_proj = nn.Linear(hidden_size, num_heads)
        nn.init.zeros_(self.eta_proj.weight)
        nn.init.zeros_(self.eta_proj.bias)

    def step(self, hidden_states: Tensor, s: Tensor) -> Tensor:
        return 2 * self.eta_proj(hidden_states).sigmoid()


class FromZero(OwnRule):
    """d_1 = 0: a feature is written once the keys have shown it."""

    def base(self, d: Tensor, Gamma: Tensor) -> Tensor:
        return torch.zeros_like(d)


APF = {"forgetting": "data"}
RULES: dict[str, tuple[type[OSDN], dict[str, Any]]] = {
    "OSDN": (OSDN, {}),
    "APF": (OSDN, APF),
    "APF, η 0": (OSDN, {**APF, "eta": 0.0}),
    "normalised step": (Normalised, {}),
    "normalised step, η 0.3": (Normalised, {"eta": 0.3}),
    "normalised step, APF": (Normalised, APF),
    "forgetting towards d_1": (TowardsStart, APF),
    "forgetting towards d_1, normalised step": (NormalisedTowardsStart, APF),
    "η by head": (HeadStep, {}),
    "η by token": (TokenStep, {}),
    "η by token, APF": (TokenStep, APF),
    "d_1 = 0": (FromZero, {"learn_initial_precond": False}),
}


def code(label: str) -> str:
    """A hash of what a rule is: its options and the text of its classes."""
    kind, options = RULES[label]
    own = [one for one in kind.__mro__ if one.__module__ == __name__]
    return sha256(repr([options, *map(inspect.getsource, own)]).encode()).hexdigest()[:16]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train one rule with one seed, from the weights that OSDN starts from."""
    torch.set_num_threads(1)
    recipe = load_study(STUDY, job["overrides"]).mqar[EXPERIMENT]
    width = recipe.widths[0]
    cell = Cell("osdn", recipe.tasks[0], width, job["learning_rate"], job["seed"])
    torch.manual_seed(cell.seed)
    model = recipe.build("osdn", width)
    kind, own = RULES[job["rule"]]
    own = {**recipe.mixers["osdn"], **own}
    del own["mixer"]
    for i, mixer in enumerate(model.mixers):
        if isinstance(mixer, OSDN):
            model.mixers[i] = kind(width, **own)
            loaded = model.mixers[i].load_state_dict(mixer.state_dict(), strict=False)
            assert set(loaded.unexpected_keys) <= {"initial_precond"}, loaded
    return {**job, **train_model(model, recipe, cell)._asdict()}


def table(found: list[dict[str, Any]], labels: list[str]) -> dict[str, Any]:
    """Share of right answers by rule, less the first rule's, and by the place of the pair."""
    by_rule = {
        label: {one["seed"]: one for one in found if one["rule"] == label} for label in labels
    }
    first, rows = by_rule[labels[0]], []
    for label, seeds in by_rule.items():
        shares = [one["accuracy"] for one in seeds.values()]
        less = [seeds[i]["accuracy"] - first[i]["accuracy"] for i in seeds.keys() & first.keys()]
        pairs = [one["by_pair"] for one in seeds.values()]
        n = max(1, len(pairs[0]) // 4)
        ends = [mean(one[-n:]) - mean(one[:n]) for one in pairs]
        diverged = sum(one["diverged"] for one in seeds.values())
        counts = f"{len(shares)}" + (f", {diverged} diverged" if diverged else "")
        less_first = "" if seeds is first else signed(less, ".3f")
        middle = f"{mean(shares):.3f}, {median(shares):.3f}"
        rows.append([label, counts, middle, less_first, signed(ends, ".3f")])
    columns = [
        "rule",
        "seeds",
        "share, median",
        f"less {labels[0]}",
        "last quarter of the pairs less first",
    ]
    return {"title": f"{EXPERIMENT} by rule", "columns": columns, "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    """Train what `--out` lacks, print the table."""
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a field of the study")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[21, 22, 23, 24])
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/own_rule.jsonl"))
    args = parser.parse_intermixed_args(arguments)
    if min(args.seeds) < 0 or args.processes < 1:
        parser.error("expected seeds from 0 on and at least one process")
    try:
        load_study(STUDY, args.overrides)
        append(args.out)
    except UserError as error:
        parser.error(str(error))
    jobs = [
        {"rule": rule, "seed": seed, "learning_rate": args.learning_rate,
         "overrides": args.overrides, "code": code(rule)}
        for seed in args.seeds
        for rule in args.rules
    ]  # fmt: skip
    kept = [json.loads(line) for line in args.out.read_text().splitlines()]
    found = [one for one in kept if any(job.items() <= one.items() for job in jobs)]
    left = [job for job in jobs if not any(job.items() <= one.items() for one in found)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.processes) as pool:
        for outcome in tqdm(pool.imap_unordered(run, left), total=len(left), unit="run"):
            append(args.out, outcome)
            found.append(outcome)
    print(markdown(table(found, args.rules)))


if __name__ == "__main__":
    main()
