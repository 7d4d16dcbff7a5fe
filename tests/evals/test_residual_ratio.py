"""The residual ratio is the recurrence's own, on the layer's own activations."""

import json
import math

import pytest
import torch

import osdn.layers.osdn
from osdn import OSDNConfig, OSDNForCausalLM
from osdn.cli.main import main
from osdn.data import byte_tokenizer
from osdn.evals.residual_ratio import POSITIONS, SHADOWS, activations, capture, summarise_layer
from osdn.layers.osdn import OSDN
from osdn.ops import online_scaled_delta_rule, reference


@pytest.fixture
def layers(loaded):
    ids = torch.randint(0, 256, (1, 60), generator=torch.Generator().manual_seed(3))
    return ids, capture(loaded.model, ids)


def error(S, k, v):
    """f(S) = ½‖Sᵀk − v‖² for every head."""
    return 0.5 * (torch.einsum("hkv,hk->hv", S, k) - v).square().sum(-1)


def test_it_equals_the_recurrences_error_after_over_before(layers):
    for layer in layers[1]:
        ratio = (1 - layer.beta * layer.step(layer.precond)).square()
        S = torch.zeros(*layer.k.shape[1:], layer.v.shape[-1], dtype=torch.float64)
        for t, (k, v, beta, d) in enumerate(zip(*layer)):
            before = error(S, k, v)
            S = reference.write(S, d, k, v, beta)
            torch.testing.assert_close(error(S, k, v) / before, ratio[t], rtol=1e-5, atol=1e-12)


def test_the_activations_are_those_that_the_operator_gets(loaded, layers, monkeypatch):
    seen = []
    monkeypatch.setattr(
        osdn.layers.osdn,
        "online_scaled_delta_rule",
        lambda q, k, v, beta, log_gamma=None, **rule: (
            seen.append((k, v, beta, log_gamma, rule))
            or online_scaled_delta_rule(q, k, v, beta, log_gamma, **rule)
        ),
    )
    with torch.no_grad():
        loaded.model(layers[0], use_cache=False)
    assert len(seen) == len(layers[1]) == 2
    for (k, v, beta, log_gamma, rule), layer in zip(seen, layers[1]):
        for given, found in ((k, layer.k), (v, layer.v), (beta, layer.beta)):
            torch.testing.assert_close(found, given[0].double(), rtol=1e-5, atol=1e-6)
        rule = {**rule, "output_final_state": True, "backend": "reference"}
        for t in (1, 30, 59):
            gamma = None if log_gamma is None else log_gamma[:, :t]
            with torch.no_grad():
                _, _, d = online_scaled_delta_rule(
                    k[:, :t], k[:, :t], v[:, :t], beta[:, :t], gamma, **rule
                )
            torch.testing.assert_close(layer.precond[t], d[0], rtol=1e-5, atol=1e-6)


def test_the_preconditioner_moves_in_osdn_layers_alone(layers):
    adaptive, plain = layers[1]
    assert (adaptive.precond - 1).abs().max() > 0.01
    assert (plain.precond == 1).all()


def test_d_starts_in_its_box_as_in_the_layer():
    """A learned d_1 may lie outside; the layer puts it into the box before the first write."""
    layer = OSDN(8, 2, precond_min=0.9, precond_max=1.1).double()
    with torch.no_grad():
        layer.initial_precond.copy_(torch.tensor([0.2, 1.0, 1.05, 3.0]).expand(2, 4))
    found = activations(layer, torch.randn(1, 12, 8, dtype=torch.float64)).precond[0]
    torch.testing.assert_close(found[0], torch.tensor([0.9, 1.0, 1.05, 1.1]).double())


def test_layers_of_a_hybrid_have_their_numbers_in_the_model(tmp_path):
    torch.manual_seed(0)
    mixer = ["attention", "osdn", "attention", "delta_net"]
    sizes = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 4, "intermediate_size": 16}
    config = OSDNConfig(**sizes, vocab_size=258, mixer=mixer, bos_token_id=256)
    OSDNForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompt.txt").write_text("some words " * 4)
    places = ["--data", str(tmp_path / "prompt.txt"), "--out", str(tmp_path / "out")]
    command = ["eval", "residual-ratio", str(tmp_path / "model"), *places, "--device", "cpu"]
    assert main(command) == 0
    result = json.loads(next((tmp_path / "out").rglob("result.json")).read_text())
    assert [row[0] for row in result["tables"][0]["rows"]] == [1, 3]
    assert list(result["curves"][0]["series"]) == ["layer 1", "layer 3"]


def test_shadows_by_hand():
    torch.manual_seed(0)
    layer = OSDN(8, 2, precond_min=0.5, precond_max=1.5).double()
    found = activations(layer, torch.randn(1, 40, 8, dtype=torch.float64))
    s, d, beta = found.k.square(), found.precond, found.beta
    steps = {
        "own": (d * s).sum(-1),
        "ones": s.sum(-1),
        "mean over features": d.mean(-1) * s.sum(-1),
        "features reversed": (d[..., [3, 2, 1, 0]] * s).sum(-1),
    }
    assert list(steps) == list(SHADOWS)
    summary = summarise_layer(found)
    for name, step in steps.items():
        ratio = (1 - beta * step) ** 2
        parts = [ratio, step, beta * step, (ratio > 1).double()]
        parts[0] = parts[0].log()
        for i in range(POSITIONS):
            expected = [x[4 * i : 4 * i + 4].mean().item() for x in parts]
            assert summary[name][i] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_command(checkpoint, llama, tmp_path, capsys):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"text": f"{i} " * 30}) + "\n" for i in range(3)))
    arguments = ["--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["eval", "residual-ratio", str(checkpoint), *arguments]) == 0
    result = json.loads(next((tmp_path / "out").rglob("result.json")).read_text())
    assert [one["name"] for one in result["scores"]] == list(SHADOWS)
    assert result["samples"] == 3 and len(result["tables"][0]["rows"]) == 2
    logs = [math.log(float(row[1])) for row in result["tables"][0]["rows"]]
    own = result["scores"][0]
    assert math.log(own["value"]) == pytest.approx(sum(logs) / 2, abs=0.01)
    assert own["low"] <= own["value"] <= own["high"]
    capsys.readouterr()
    assert main(["eval", "residual-ratio", str(llama), *arguments]) == 1
    assert "needs osdn or delta_net layers" in capsys.readouterr().err
