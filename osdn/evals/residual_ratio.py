"""The residual ratio: how much of each token's prediction error one write leaves, layer by layer.

For every token and head of the layers of a model that are not attention

    q_t = (1 − β_t⟨d_t, s_t⟩)² = f_t(S_t) / f_t(S_{t−1}),   s_t = k_t ⊙ k_t

with f_t(S) = ½‖Sᵀk_t − v_t‖² (docs/explanation/operator.md). Where the memory decays,
S̃_t = α_t S_{t−1} stands in place of S_{t−1}. It depends only on keys and gates, so
other preconditioners can be tried on the same activations: the shadow ablations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from osdn.errors import UserError
from osdn.evals.evaluation import Evaluation, option
from osdn.evals.models import LanguageModel
from osdn.evals.recall_data import read_prompts
from osdn.evals.results import exp, make_result, point, score
from osdn.evals.runner import Record, Sample
from osdn.layers.osdn import OSDN
from osdn.ops import reference
from osdn.ops.operands import Options
from osdn.system.outside import Measure

POSITIONS = 10  # bins of relative position
MEASURES = 4  # of a shadow, see summarise_layer
SMALLEST = 1e-12  # what a ratio below it counts as in the geometric mean
SHADOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "own": lambda d: d,
    "ones": torch.ones_like,
    "mean over features": lambda d: d.mean(-1, keepdim=True).expand_as(d),
    "features reversed": lambda d: d.flip(-1),
}


class Activations(NamedTuple):
    """What one layer made of a sequence, in float64.

    k: [T, H, K] unit keys.  v: [T, H, V].  beta: [T, H].  precond: [T, H, K], d_t of every write.
    """

    k: Tensor
    v: Tensor
    beta: Tensor
    precond: Tensor

    def step(self, precond: Tensor) -> Tensor:
        """⟨d_t, s_t⟩ of every token and head, [T, H], with another preconditioner in d's place."""
        return (precond * self.k.square()).sum(-1)


@torch.no_grad()
def capture(model: nn.Module, input_ids: Tensor) -> list[Activations]:
    """The activations of every layer but attention for one sequence, [1, T] token ids.

    The layer's input is caught on its way in; keys, values and gates are made by the layer's own
    parts in the model's precision, and d by the definition, in float64.
    """
    layers = mixers(model)
    inputs: dict[nn.Module, Tensor] = {}
    hooks = [
        # On its way in; what the layer makes of it is then made once more, by its own parts.
        layer.register_forward_pre_hook(lambda module, given: inputs.update({module: given[0]}))
        for layer in layers
    ]
    try:
        model(input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [activations(layer, inputs[layer]) for layer in layers]


def mixers(model: nn.Module) -> list[OSDN]:
    """The layers of a model that are not attention, first to last."""
    return [module for module in model.modules() if isinstance(module, OSDN)]


def activations(layer: OSDN, hidden_states: Tensor) -> Activations:
    """What a layer makes of hidden_states [1, T, D]."""
    given = layer.operands(hidden_states)
    k, v, beta = (x[0].double() for x in (given.k, given.v, given.beta))  # [T, H, ·], the one row
    gamma = None if given.log_gamma is None else given.log_gamma[0].double()
    return Activations(k, v, beta, preconditioners(layer, k, beta, gamma))


def preconditioners(layer: OSDN, k: Tensor, beta: Tensor, log_gamma: Tensor | None) -> Tensor:
    """d_t [T, H, K] for t = 1..T, before token t's own update, by the reference's `adapt`."""
    options = {"beta_aware": False, "precond_min": None, "precond_max": None, **layer.rule}
    rule = Options(scale=1.0, **options)
    start = layer.start_precond()
    d = torch.ones_like(k[0]) if start is None else start.detach().double()
    if rule.constant_precond(log_gamma is not None):
        return d.expand_as(k)
    # Token by token, as the definition: a prompt has a thousand tokens, and this is no training.
    path = []
    for t in range(len(k)):
        path.append(d)
        d = reference.adapt(d, k[t], beta[t], None if log_gamma is None else log_gamma[t], rule)
    return torch.stack(path)


def summarise_layer(layer: Activations) -> dict[str, list[list[float]]]:
    """Of every shadow, by relative position: means of log q, ⟨d,s⟩, β⟨d,s⟩ and of q > 1."""
    found = {}
    for name, shadow in SHADOWS.items():
        step = layer.step(shadow(layer.precond))  # [T, H]
        written = layer.beta * step
        ratio = (1 - written).square()  # q, [T, H]
        # The mean of logs: q spans orders of magnitude, and its product over tokens is what counts.
        measures = [ratio.clamp(min=SMALLEST).log(), step, written, (ratio > 1).double()]
        means = torch.stack([x.mean(-1) for x in measures])  # [4, T]
        # By bin of relative position, so that prompts of any length are compared.
        found[name] = [part.mean(1).tolist() for part in means.tensor_split(POSITIONS, dim=1)]
    return found


def _course(logs: np.ndarray) -> list[list[float]]:
    """[position, value, low, high] from mean log q [prompt, position]."""
    return [
        point((i + 0.5) / POSITIONS, score("", list(logs[:, i]), scale=exp))
        for i in range(POSITIONS)
    ]


class Prompt(Sample):
    """A record: of every layer and shadow, [position, measure]."""

    layers: list[dict[str, list[list[Measure]]]] = Field(min_length=1)

    def lengths(self) -> tuple[int, ...]:
        """Layers; the lengths within are checked below."""
        return (len(self.layers),)

    @model_validator(mode="after")
    def _all_there(self) -> Self:
        for layer in self.layers:
            if layer.keys() != SHADOWS.keys():
                raise ValueError(f"expected the shadows {', '.join(SHADOWS)}")
            if any([*map(len, one)] != [MEASURES] * POSITIONS for one in layer.values()):
                raise ValueError(f"expected {MEASURES} measures at {POSITIONS} positions")
        return self


@dataclass(frozen=True, kw_only=True)
class ResidualRatio(Evaluation):
    """Geometric means of q by layer and by relative position, for d and its shadows."""

    task: ClassVar[str] = "residual-ratio"
    about: ClassVar[str] = "what a write leaves of the error, and shadow ablations"
    record: ClassVar[type[Sample]] = Prompt

    data: str = option("prompts: a .jsonl file with a field text, or a text file")
    limit: int = option("prompts at most", default=50, least=1)
    context: int = option("tokens of a prompt at most", default=1024, least=1)

    def items(self, model: LanguageModel) -> tuple[dict[str, Any], list[Record]]:
        """The prompts' tokens."""
        if not mixers(model.model):
            raise UserError(
                f"{model.name}: the residual ratio needs osdn or delta_net layers, and this "
                f"{model.model.config.model_type} model has none"
            )
        items = []
        for i, prompt in enumerate(read_prompts(self.data, self.limit)):
            tokens = [*model.start, *model.encode(prompt)][: self.context]
            if len(tokens) < POSITIONS:
                raise UserError(
                    f"{self.data}: prompt {i} has {len(tokens)} tokens; expected at least "
                    f"{POSITIONS}, one for each bin of relative position"
                )
            items.append({"id": str(i), "tokens": tokens})
        return {}, items

    def answer(
        self, model: LanguageModel, items: list[Record], protocol: dict[str, Any]
    ) -> list[Record]:
        """Measure a batch of prompts, one after another."""
        records = []
        for item in items:
            ids = torch.tensor([item["tokens"]], device=model.model.device)
            layers = [summarise_layer(layer) for layer in capture(model.model, ids)]
            records.append({"tokens": len(item["tokens"]), "layers": layers})
        return records

    def conclude(
        self, model: LanguageModel, protocol: dict[str, Any], records: list[Record]
    ) -> dict[str, Any]:
        """The result: geometric means by layer and by relative position, for d and its shadows."""
        # [prompt, layer, shadow, position, measure]
        names = list(SHADOWS)
        x = np.array(
            [[[one[name] for name in names] for one in record["layers"]] for record in records]
        )
        layers = [layer.layer_idx for layer in mixers(model.model)]  # attention layers count, too
        scores = [
            score(name, list(x[:, :, i, :, 0].mean((1, 2))), group="all layers", scale=exp)
            for i, name in enumerate(names)
        ]
        rows = []
        for i, layer in enumerate(layers):
            means = x[:, i].mean((0, 2))  # [shadow, measure]
            ratios = [f"{exp(value):.3g}" for value in means[:, 0]]
            rows.append([layer, *ratios, *(f"{value:.3f}" for value in means[0, 1:])])
        columns = ["layer", *(f"q, {name}" for name in names), "⟨d,s⟩", "β⟨d,s⟩", "share q > 1"]
        axes = {"x": "relative position", "y": "geometric mean of q", "log_y": True}
        by_layer = {f"layer {n}": _course(x[:, i, 0, :, 0]) for i, n in enumerate(layers)}
        by_shadow = {name: _course(x[:, :, i, :, 0].mean(1)) for i, name in enumerate(names)}
        return make_result(
            "residual-ratio",
            protocol=protocol,
            model=model.describe(),
            samples=len(records),
            scores=scores,
            tables=[{"title": "Residual ratio by layer", "columns": columns, "rows": rows}],
            curves=[
                {"title": "Residual ratio by layer", "series": by_layer, **axes},
                {"title": "Residual ratio and its shadows", "series": by_shadow, **axes},
            ],
        )
