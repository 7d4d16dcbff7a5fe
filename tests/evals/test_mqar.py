"""MQAR: the published law of the task, a right measure, a grid that goes on where it stopped."""

import numpy as np
import pytest
import torch
from torch import nn

from osdn.evals.mqar.grid import compare
from osdn.evals.mqar.recipe import MQARRecipe
from osdn.evals.mqar.task import TEST, TRAIN, MQARModel, Task, answers_right, generate, train
from osdn.model.loss import IGNORED
from osdn.train.recipe import Optimizer, Schedule
from tests.evals.test_mqar_grid import SMALL

PUBLISHED = Task(length=128, pairs=8)


def test_sequences_are_pairs_then_every_key_once_with_its_value_as_label():
    inputs, labels = generate(PUBLISHED, 200, seed=3, stream=TRAIN)
    for x, y in zip(inputs.numpy(), labels.numpy()):
        keys, values = x[0:16:2], x[1:16:2]
        assert len(set(keys)) == len(set(values)) == 8
        assert keys.min() >= 1 and keys.max() <= 4095
        assert values.min() >= 4096 and values.max() <= 8191
        at = np.flatnonzero(y != IGNORED)
        assert (at >= 16).all() and (at % 2 == 0).all()
        assert dict(zip(x[at], y[at])) == dict(zip(keys, values))
        assert not x[16:][~np.isin(np.arange(16, 128), at)].any()


def test_gaps_follow_the_power_law():
    """With one pair the gap is a single draw: p_i ∝ i^(a−1); χ² at the 99.9% quantile."""
    task, n = Task(length=34, pairs=1, vocab_size=8), 40_000
    _, labels = generate(task, n, seed=0, stream=TRAIN)
    gap = ((labels != IGNORED).int().argmax(1) - 2) // 2
    counts = np.bincount(gap.numpy(), minlength=16)
    p = np.arange(1, 17) ** (0.01 - 1.0)
    expected = n * p / p.sum()
    assert (((counts - expected) ** 2) / expected).sum() < 37.7  # 15 degrees of freedom


def test_later_gaps_are_drawn_without_replacement_from_what_is_left():
    """P(first = i, second = j) = p_i p_j / (1 − p_i), over all pairs of three places."""
    task, n = Task(length=10, pairs=2, vocab_size=8), 60_000
    inputs, _ = generate(task, n, seed=1, stream=TRAIN)
    places = [(inputs[:, 4:] == inputs[:, key : key + 1]).int().argmax(1) // 2 for key in (0, 2)]
    counts = np.zeros((3, 3))
    np.add.at(counts, (places[0].numpy(), places[1].numpy()), 1)
    p = np.arange(1, 4) ** (0.01 - 1.0)
    p /= p.sum()
    law = p[:, None] * p[None] / (1 - p[:, None])
    np.fill_diagonal(law, 0)
    assert np.abs(counts / n - law).max() < 0.008  # four standard deviations


def test_keys_and_values_are_uniform():
    inputs, _ = generate(Task(length=8, pairs=2, vocab_size=16), 30_000, seed=2, stream=TRAIN)
    for column, low, high in ((0, 1, 8), (2, 1, 8), (1, 8, 16), (3, 8, 16)):
        counts = np.bincount(inputs[:, column].numpy(), minlength=high)[low:high]
        expected = 30_000 / (high - low)
        assert ((counts - expected) ** 2 / expected).sum() < 26.1  # χ², 8 degrees, 99.9%


def test_filler_is_random_where_asked_and_leaves_the_pairs_alone():
    plain, labels = generate(PUBLISHED, 50, seed=5, stream=TRAIN)
    filled, same = generate(PUBLISHED._replace(random_filler=True), 50, seed=5, stream=TRAIN)
    rest = filled[:, 16:][same[:, 16:] == IGNORED]
    assert rest.float().mean().item() == pytest.approx(4095.5, rel=0.05)
    asked = same != IGNORED
    assert torch.equal(asked, labels != IGNORED) and torch.equal(same, labels)
    assert torch.equal(filled[asked], plain[asked]) and torch.equal(filled[:, :16], plain[:, :16])


def test_seed_and_stream_decide_everything_and_the_streams_do_not_meet():
    first, _ = generate(PUBLISHED, 300, seed=0, stream=TRAIN)
    again, _ = generate(PUBLISHED, 300, seed=0, stream=TRAIN)
    test, _ = generate(PUBLISHED, 300, seed=0, stream=TEST)
    other, _ = generate(PUBLISHED, 300, seed=1, stream=TRAIN)
    assert torch.equal(first, again)
    rows = [{tuple(row) for row in x.tolist()} for x in (first, test, other)]
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]


class Lookup(nn.Module):
    """Answers from the first `known` pairs; `shift` answers with another pair's value instead."""

    def __init__(self, task: Task, shift: int, known: int = 10**9):
        super().__init__()
        self.task, self.shift, self.known = task, shift, known
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, inputs, at):
        keys, values = (
            inputs[:, 0 : 2 * self.task.pairs : 2],
            inputs[:, 1 : 2 * self.task.pairs : 2],
        )
        found = (keys[:, None] == inputs.gather(1, at)[..., None]).int().argmax(2)
        answer = values.gather(1, (found + self.shift) % self.task.pairs)
        answer = answer.masked_fill(found >= self.known, 0).flatten()
        return nn.functional.one_hot(answer, self.task.vocab_size).float()


def test_a_solved_instance_scores_one_and_a_shuffled_one_chance():
    inputs, labels = generate(PUBLISHED, 400, seed=0, stream=TEST)
    assert answers_right(Lookup(PUBLISHED, 0), inputs, labels, 64).eq(1).all()
    assert answers_right(Lookup(PUBLISHED, 1), inputs, labels, 64).eq(0).all()
    early = answers_right(Lookup(PUBLISHED, 0, known=3), inputs, labels, 64)
    assert early[:, :3].eq(1).all() and early[:, 3:].eq(0).all()  # in the order of the pairs
    shuffled = labels.clone()
    generator = torch.Generator().manual_seed(0)
    for row in shuffled:
        at = (row != IGNORED).nonzero()[:, 0]
        row[at] = row[at[torch.randperm(8, generator=generator)]]
    chance = answers_right(Lookup(PUBLISHED, 0), inputs, shuffled, 64).mean().item()
    assert chance == pytest.approx(1 / 8, abs=4 * (0.125 * 0.875 / 3200) ** 0.5)


def test_two_layers_learn_the_task_and_without_training_score_nothing(tmp_path):
    """The path a grid cell takes, on an instance that is easy enough for seconds."""
    grid = {
        **SMALL,
        "mixers": {"osdn": {"mixer": "osdn", "num_heads": 1, "precond_min": 0, "precond_max": 2}},
        "widths": [32],
        "learning_rates": [1e-2],
        "model": {"init_std": 0.1},
        "train": {"examples": 1200, "test_examples": 100, "epochs": 3, "stop_at": 0.9},
    }
    result = compare(MQARRecipe.model_validate(grid), tmp_path / "trained")
    assert result["scores"][0]["value"] > 0.8
    untrained = {**grid, "learning_rates": [1e-9]}
    untrained["train"] = {**grid["train"], "examples": 8, "epochs": 1}
    result = compare(MQARRecipe.model_validate(untrained), tmp_path / "untrained")
    assert result["scores"][0]["value"] < 0.35


def test_the_model_sees_no_future():
    torch.manual_seed(0)
    inputs, _ = generate(Task(16, 2, 16), 4, seed=0, stream=TRAIN)
    for mixer in ("osdn", "delta_net", "attention"):
        for layers in (["mixer", "mixer"], ["convolution", "mixer"]):
            model = MQARModel(
                vocab_size=16, width=8, layers=layers, mixer=mixer, options={"num_heads": 2}
            )
            seventh = torch.full((4, 1), 7)
            before = model(inputs, seventh)
            torch.testing.assert_close(model(inputs[:, :8], seventh), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records a CUDA graph")
@pytest.mark.parametrize("mixer", ["osdn", "delta_net", "attention"])
def test_replayed_steps_are_the_launched_ones(mixer, monkeypatch):
    """With a last batch of another size, and over more than one epoch."""
    import osdn.evals.mqar.steps as steps

    def trained(warm_up):
        monkeypatch.setattr(steps, "WARM_UP", warm_up)
        torch.manual_seed(0)
        model = MQARModel(
            vocab_size=64,
            width=32,
            layers=["mixer", "mixer"],
            mixer=mixer,
            options={"num_heads": 2},
        ).cuda()
        outcome = train(
            model,
            Task(64, 8, 64),
            optimizer=Optimizer(lr=3e-3, weight_decay=0.1, clip=1.0),
            schedule=Schedule(warmup_steps=0, min_ratio=0.0),
            examples=300,
            test_examples=64,
            batch_size=32,
            epochs=2,
            stop_at=1.0,
            seed=0,
        )
        assert outcome.steps == 20 and not outcome.diverged
        return [p.detach().clone() for p in model.parameters()]

    for replayed, launched in zip(trained(3), trained(1000)):
        torch.testing.assert_close(replayed, launched, rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_ends_the_training_and_is_no_step():
    torch.manual_seed(0)
    model = MQARModel(
        vocab_size=16, width=8, layers=["mixer"], mixer="osdn", options={"num_heads": 1}
    )
    outcome = train(
        model,
        Task(16, 2, 16),
        optimizer=Optimizer(lr=1e30, clip=None),
        schedule=Schedule(warmup_steps=0, min_ratio=0.0),
        examples=64,
        test_examples=8,
        batch_size=8,
        epochs=2,
        stop_at=1.0,
        seed=0,
    )
    assert outcome.diverged and 0 < outcome.steps < 8


def test_precision_is_that_of_the_products_and_float32_is_not_named():
    fields = {
        "mixers": {"osdn": {"mixer": "osdn", "num_heads": 2, "head_dim": 8}},
        "tasks": [{"length": 32, "pairs": 4, "batch_size": 2}],
        "widths": [16],
        "learning_rates": [1e-3],
        "language": {"vocab_size": 64},
    }
    logits, specs = [], []
    for precision in "float32", "bfloat16":
        recipe = MQARRecipe.model_validate({**fields, "train": {"precision": precision}})
        torch.manual_seed(0)
        model = recipe.build("osdn", 16)
        at = torch.arange(8)[None].expand(2, 8)
        logits.append(model(torch.arange(1, 33).repeat(2, 1), at))
        specs.append(recipe.describe(recipe.cells()[0])["train"].get("precision"))
    assert specs == [None, "bfloat16"] and logits[1].dtype == torch.float32
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 1e-4 < error < 2e-2
