"""Muon with AdamW: which parameters, PyTorch's arithmetic, and the same bits when sharded."""

import json

import pytest
import torch

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.evals.mqar.recipe import Training
from osdn.train.muon import Muon, MuonWithAdamW
from osdn.train.optim import fill_state, make_optimizer, named_state
from osdn.train.recipe import Optimizer
from tests.train.test_parallel import STOPPED_IN_VALIDATION
from tests.train.tiny import curve, fields, join, start_ranks, write_texts


def make(**options) -> tuple[OSDNForCausalLM, MuonWithAdamW]:
    config = OSDNConfig(
        hidden_size=16, num_heads=2, num_hidden_layers=2, vocab_size=20, intermediate_size=24,
        mixer=["osdn", "attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = OSDNForCausalLM(config)
    optimizer = make_optimizer(model, Optimizer(name="muon", **options))
    assert isinstance(optimizer, MuonWithAdamW)
    fill_state(optimizer, 0)
    return model, optimizer


def test_muon_takes_the_matrices_of_the_blocks():
    model, optimizer = make()
    muon, adamw = ([p for g in part.param_groups for p in g["params"]] for part in optimizer.parts)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(map(id, muon + adamw)) == sorted(names)
    kinds = {names[id(p)].split(".")[-2] for p in muon}
    assert kinds == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    assert all(names[id(p)].startswith("model.layers.") for p in muon) and len(muon) == 14


def test_a_step_is_torch_optim_muons_and_adamws():
    model, optimizer = make(lr=0.02, weight_decay=0.3, momentum=0.8)
    other, _ = make()
    chosen = {id(p) for p in optimizer.parts[0].param_groups[0]["params"]}
    matrices = [p for q, p in zip(model.parameters(), other.parameters()) if id(q) in chosen]
    plain = torch.optim.Muon(
        matrices, lr=0.02, weight_decay=0.3, momentum=0.8, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for p, q in zip(model.parameters(), other.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        plain.step()
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q) == (id(p) in chosen)  # the others are AdamW's, and moved


def test_a_step_that_is_not_finite_changes_nothing():
    model, optimizer = make()
    for finite in (True, False):
        before = {name: x.clone() for name, x in named_state(model, optimizer).items()}
        for p in model.parameters():
            p.grad = torch.randn_like(p) if finite else torch.full_like(p, torch.nan)
        optimizer.found_inf = torch.tensor(0.0 if finite else 1.0)
        optimizer.step()
        for name, x in named_state(model, optimizer).items():
            assert torch.equal(x, before[name]) != finite, name


@pytest.mark.slow
def test_two_processes_that_share_the_weights_and_stop_give_the_bits_of_one(tmp_path):
    """Gathered over two processes, saved, loaded; the sum in a gradient's norm is left out."""
    recipe = tmp_path / "recipe.yaml"
    options = {"rows": 1, "batch_rows": 2, "steps": 6, "checkpoint_every": 3, "validate_every": 3}
    plain = fields(write_texts(tmp_path / "texts"), **options)
    plain["train"]["optimizer"] = {"name": "muon", "lr": 1e-2, "clip": None}
    recipe.write_text(json.dumps(plain))
    assert join(start_ranks(recipe, tmp_path / "one", 1)) == [0]
    stopped = {1: STOPPED_IN_VALIDATION}
    two = tmp_path / "two"
    assert join(start_ranks(recipe, two, 2, "parallel.shard=2", rank_code=stopped)) == [143, 143]
    assert join(start_ranks(recipe, two, 2, "parallel.shard=2")) == [0, 0]
    lines, expected = curve(two), curve(tmp_path / "one")
    for line in (*lines, *expected):
        line.pop("grad_norm", None)
    assert lines == expected
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_other_models_and_mqar_are_refused():
    with pytest.raises(TypeError, match="expected an OSDNForCausalLM for Muon, got Linear"):
        make_optimizer(torch.nn.Linear(2, 2), Optimizer(name="muon"))
    with pytest.raises(ValueError, match="name: expected adamw"):
        Training(optimizer=Optimizer(name="muon"))
    assert isinstance(make_optimizer(torch.nn.Linear(2, 2), Optimizer()), torch.optim.AdamW)
    assert issubclass(Muon, torch.optim.Muon)
