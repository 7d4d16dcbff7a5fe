"""The parts of a step by themselves: initial weights, recomputation, z-loss, measurements."""

import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.data import Row, collate
from osdn.errors import UserError
from osdn.evals.residual_ratio import activations
from osdn.layers.gates import APF_BIAS
from osdn.model.loss import linear_cross_entropy
from osdn.train.blocks import prepare_blocks
from osdn.train.initial import Initializer, empty_model
from osdn.train.log.precond import keys, measured, walk
from osdn.train.objective import Objective, inputs
from osdn.train.setup import check_read, passes
from tests.train.tiny import recipe

CPU = torch.device("cpu")


def config(**changes) -> OSDNConfig:
    sizes = {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 3, "intermediate_size": 48}
    mixers = ["osdn", "attention", "delta_net"]
    return OSDNConfig(**{**sizes, "vocab_size": 50, "mixer": mixers, "pad_token_id": 3, **changes})


def initialised(config: OSDNConfig, seed: int = 0) -> OSDNForCausalLM:
    model = empty_model(config)
    Initializer(model, seed=seed, device=CPU).fill(model)
    return model


def batch(tokens: int = 40):
    numbers = torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    return collate([Row(numbers[: tokens // 2], [0]), Row(numbers[tokens // 2 :], [0, 7])])


@pytest.mark.parametrize("tied", [False, True])
def test_weights_depend_on_seed_and_names_alone(tied):
    whole = initialised(config(forgetting="data", tie_word_embeddings=tied))
    parts = empty_model(config(forgetting="data", tie_word_embeddings=tied))
    initializer = Initializer(parts, seed=0, device=CPU)
    torch.manual_seed(12)  # what is drawn elsewhere does not matter
    for block in reversed(parts.model.layers):
        initializer.fill(block)
    initializer.fill(parts)
    other = initialised(config(forgetting="data", tie_word_embeddings=tied), seed=1)
    more = initialised(config(forgetting="data", num_hidden_layers=4, mixer=["osdn"] * 4))
    for name, value in whole.named_parameters():
        assert torch.equal(value, parts.get_parameter(name))
        if value.std() > 0 and "gamma_proj" not in name:
            assert value.std().item() == pytest.approx(0.02, rel=0.3) and abs(value.mean()) < 0.004
            assert not torch.equal(value, other.get_parameter(name))
    name = "model.layers.0.attn.q_proj.weight"
    assert torch.equal(whole.get_parameter(name), more.get_parameter(name))
    assert not torch.equal(whole.get_parameter(name), more.get_parameter(name.replace("0", "1")))
    assert (parts.lm_head.weight is parts.model.embeddings.weight) == tied


def test_special_values_are_those_of_a_model_built_at_once():
    model, built = (
        initialised(config(forgetting="data")),
        OSDNForCausalLM(config(forgetting="data")),
    )
    mixer = model.model.layers[0].attn
    assert torch.equal(mixer.initial_precond, torch.ones(2, 16))
    assert torch.equal(mixer.gamma_proj.bias, torch.full((2,), APF_BIAS))
    assert not mixer.gamma_proj.weight.any() and not model.model.embeddings.weight[3].any()
    for (name, value), (_, other) in zip(model.named_parameters(), built.named_parameters()):
        assert (value.std() > 0) == (other.std() > 0), name  # constants where it has constants
        if value.std() == 0:
            assert torch.equal(value, other), name


class Count(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


def gradients(checkpointing: str) -> tuple[dict[str, torch.Tensor], Counter]:
    model = initialised(config(forgetting="data"))
    prepare_blocks(model, checkpointing=checkpointing, compile=False)
    objective = Objective(model, autocast=False, z_loss=0.0).train()
    with Count() as count:
        objective(*inputs(batch(), CPU), 30).backward()
    return {name: p.grad for name, p in model.named_parameters()}, count.calls


def test_what_is_made_again_changes_no_gradient():
    (none, once), (selective, some), (full, all_) = map(gradients, ("none", "selective", "full"))
    for name, gradient in none.items():
        assert torch.equal(gradient, selective[name]) and torch.equal(gradient, full[name]), name
    product, silu = "aten.mm.default", "aten.silu.default"
    assert once[product] == some[product] < all_[product]  # products are kept, or made again
    assert once[silu] < some[silu] == all_[silu]
    ours = {name for name in once if name.startswith("osdn.") and "backward" not in name}
    convolution = "osdn.short_convolution.default"
    (mixer,) = ours - {convolution}
    assert once[mixer] == some[mixer] == 2 and all_[mixer] == 4
    assert once[convolution] == 2 and some[convolution] == all_[convolution] == 4


def test_nothing_is_made_again_without_a_gradient():
    model = initialised(config())
    prepare_blocks(model, checkpointing="full", compile=False)
    with torch.no_grad(), Count() as count:
        Objective(model, autocast=False, z_loss=0.0).train()(*inputs(batch(), CPU), 30)
    plain = initialised(config())
    with torch.no_grad(), Count() as expected:
        Objective(plain, autocast=False, z_loss=0.0).train()(*inputs(batch(), CPU), 30)
    assert count.calls == expected.calls


def test_z_loss_is_the_mean_squared_log_partition(monkeypatch):
    h, w = torch.randn(9, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    labels = torch.tensor([3, 1, -100, 0, 19, 7, -100, 4, 5])
    log_z = (h @ w.T).logsumexp(-1)[labels != -100]
    with_z, without = (linear_cross_entropy(h, w, labels, 5, z_loss=z) for z in (0.3, 0.0))
    assert (with_z - without).item() == pytest.approx(0.3 * log_z.square().sum().item() / 5)
    h.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, z_loss=0.3), (h, w)
    )


def test_the_objective_adds_z_loss_in_training_alone():
    model = initialised(config())
    plain = Objective(model, autocast=False, z_loss=0.0)
    with_z = Objective(model, autocast=False, z_loss=1e-2)
    given = (*inputs(batch(), CPU), 30)
    difference = with_z.train()(*given) - plain.train()(*given)
    targets = batch().targets
    assert difference.item() == pytest.approx(1e-2 * math.log(50) ** 2 * targets / 30, rel=0.02)
    assert torch.equal(with_z.eval()(*given), plain.eval()(*given))


@pytest.mark.parametrize("box", [{}, {"precond_min": 0.9, "precond_max": 1.1}])
@pytest.mark.parametrize("forgetting", ["none", "data"])
def test_measurements_are_those_of_the_definition(box, forgetting):
    """Against the token-by-token definition in float64, each packed sequence by itself."""
    model = initialised(config(forgetting=forgetting, beta_aware=True, **box))
    hidden = torch.randn(1, 33, 32, generator=torch.Generator().manual_seed(1))
    cu_seqlens = torch.tensor([0, 12, 33], dtype=torch.int32)
    for layer in (model.model.layers[0].attn, model.model.layers[2].attn):
        with torch.no_grad():
            (found,) = walk([keys(layer, hidden, cu_seqlens)])
            parts = [activations(layer, hidden[:, a:b]) for a, b in ((0, 12), (12, 33))]
        d = torch.cat([part.precond.expand_as(part.k) for part in parts])
        dot = torch.cat([part.step(part.precond) for part in parts])
        beta = torch.cat([part.beta for part in parts])
        clipped = torch.zeros_like(d)
        if box and layer.adaptive:
            clipped = ((d - 0.9).abs() < 1e-6) | ((d - 1.1).abs() < 1e-6)
            assert clipped.any()
        expected = [dot.mean(), (beta * dot).mean(), clipped.double().mean()]
        assert found.tolist() == pytest.approx([x.item() for x in expected], rel=1e-5)


def test_measuring_on_the_way_changes_nothing_and_leaves_no_hook():
    model = initialised(config(forgetting="data"))
    objective, given = Objective(model, autocast=False, z_loss=0.0).train(), batch()
    plain = objective(*inputs(given, CPU), 30)
    with measured(model) as read:
        loss = objective(*inputs(given, CPU), 30)
    assert torch.equal(loss, plain)
    found = read()
    assert {len(values) for values in found.values()} == {2}  # not the attention layer
    assert found["dot"] == pytest.approx([1, 1], abs=0.05)  # unit keys but for the norm's ε, d = 1
    assert found["beta_dot"] == pytest.approx([0.5, 0.5], abs=0.02)
    objective(*inputs(collate([Row([1, 2, 3], [0])]), CPU), 2)
    assert read() == found


@pytest.mark.parametrize(
    ("rows", "batch_rows", "processes", "expected"),
    [(1, 4, 2, 2), (2, 8, 4, 1), (2, 8, 1, 4), (4, 4, 2, "train.rows=2"), (3, 4, 1, "=6, or"),
     (2, 6, 4, "set train.batch_rows=8")],
)  # fmt: skip
def test_passes_follow_from_the_batch(rows, batch_rows, processes, expected):
    given = recipe("unused", rows=rows, batch_rows=batch_rows)
    if isinstance(expected, int):
        assert passes(given, processes) == expected
    else:
        with pytest.raises(UserError, match=expected):
            passes(given, processes)


def test_a_checkpoint_of_an_earlier_version_is_believed():
    check_read({}, {"data.tokenizer": "now", "data.validation": "now"})
