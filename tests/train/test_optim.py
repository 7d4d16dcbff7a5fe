"""Which parameters decay, and the learning rate's path."""

import pytest

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.train.optim import learning_rate, make_optimizer
from osdn.train.recipe import Optimizer, Schedule


@pytest.mark.parametrize("tied", [False, True])
def test_decay_falls_on_matrices_alone(tied):
    config = OSDNConfig(
        hidden_size=16,
        num_heads=2,
        num_hidden_layers=2,
        vocab_size=20,
        mixer=["osdn", "attention"],
        forgetting="data",
        state_decay="data",
        tie_word_embeddings=tied,
    )
    model = OSDNForCausalLM(config)
    groups = make_optimizer(model, Optimizer(weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert set(names.values()) == {0.0, 0.3}
    for name, value in names.items():
        kind = name.removesuffix(".weight").split(".")[-1]
        free = ("norm", "precond", "embeddings", "bias", "A_log")
        assert (value == 0.0) == kind.endswith(free), name
    assert names["model.layers.0.attn.initial_precond"] == 0.0
    assert names["model.layers.0.attn.gamma_proj.bias"] == 0.0
    assert names["model.layers.0.attn.q_conv1d.weight"] == 0.3
    assert ("lm_head.weight" in names) != tied


def test_learning_rate_warms_up_and_falls_to_its_floor():
    def rate(step, warmup=10):
        schedule = Schedule(warmup_steps=warmup, min_ratio=0.1)
        return learning_rate(step, steps=110, peak=2.0, schedule=schedule)

    assert rate(1) == pytest.approx(0.2) and rate(10) == 2.0
    assert rate(60) == pytest.approx(2.0 * 0.55)  # half of the cosine
    assert rate(110) == pytest.approx(0.2)
    path = [rate(step) for step in range(10, 111)]
    assert path == sorted(path, reverse=True)
    assert rate(1, warmup=0) == pytest.approx(2.0, rel=1e-3)
    assert rate(110, warmup=200) == pytest.approx(2.0 * 110 / 200)  # a warm-up that never ends
