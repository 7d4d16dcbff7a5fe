"""The examples: fine-tuning with transformers' Trainer, and a rule of one's own on MQAR."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from osdn.data import byte_tokenizer
from osdn.evals.mqar.task import Outcome
from osdn.layers.osdn import OSDN

TEXT = "the delta rule writes what memory does not know yet. "


def load(path: Path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module  # where inspect looks for the source of its classes
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_trainer_finetunes_a_converted_checkpoint(tmp_path, monkeypatch):
    models = pytest.importorskip("fla.models", reason="needs flash-linear-attention")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 258}
    models.DeltaNetForCausalLM(models.DeltaNetConfig(**sizes)).save_pretrained(tmp_path / "fla")
    byte_tokenizer().save_pretrained(tmp_path / "fla")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": TEXT[i % 20 :]}) + "\n" for i in range(64)))

    example = load(Path("examples/finetune_trainer.py"))
    trainer = example.finetune(tmp_path / "fla", texts, tmp_path / "out", steps=30, lr=1e-2)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 30 and losses[-1] < losses[0] - 2

    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name).eval()
        for name in ("converted", "finetuned")
    )
    mixers = [module for module in after.modules() if isinstance(module, OSDN)]
    assert len(mixers) == 2 and all(mixer.adaptive for mixer in mixers)
    assert any((mixer.initial_precond != 1).any() for mixer in mixers)  # d_1 is trained too
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "finetuned")
    ids = torch.tensor([[256, *TEXT.encode(), 256]])
    assert tokenizer.decode(ids[0, 1:-1]) == TEXT
    with torch.no_grad():
        nats = [model(ids, labels=ids).loss.item() for model in (before, after)]
    assert nats[1] < nats[0] - 2


@pytest.mark.slow
def test_trainer_finetunes_an_upgraded_model(tmp_path, monkeypatch):
    """50 steps, saved, loaded, generated: the loaded model is the trained one."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": 3 * TEXT[i % 20 :]}) + "\n" for i in range(64)))
    example = load(Path("examples/upgrade_trainer.py"))
    trainer = example.finetune(texts, tmp_path / "out", steps=50, lr=1e-2, length=96)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 2
    trained = {k: x for k, x in trainer.model.state_dict().items() if "initial_precond" in k}
    assert len(trained) == 3 and all((x != 1).any() for x in trained.values())
    loaded = example.load_upgraded(tmp_path / "out" / "finetuned").eval()
    for name, x in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x), name
    made = example.continue_text(tmp_path / "out" / "finetuned", 3 * TEXT)
    assert made.startswith(TEXT[:30]) and "memory does not know yet" in made[45:]


own_rule = load(Path("examples/own_rule.py"))


def layer(kind, **options):
    """A layer in float64 whose d moves: d_1 is not 1, and γ and η are not where they start."""
    torch.manual_seed(0)
    made = kind(12, 2, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return made


@pytest.mark.parametrize("options", [{}, {"forgetting": "data"}, {"beta_aware": True, "eta": 0.4}])
def test_the_whole_row_is_the_operator(options):
    own, osdn = layer(own_rule.OwnRule, **options), layer(OSDN, **options)
    x = torch.randn(3, 20, 12, dtype=torch.float64)
    made, expected = own(x)[0], osdn(x)[0]
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-12)
    weight = torch.randn_like(made)
    grads = (torch.autograd.grad((y * weight).sum(), list(m.parameters()))
             for y, m in ((made, own), (expected, osdn)))  # fmt: skip
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # gates are float32


@pytest.mark.parametrize(
    "label", [label for label, (kind, _) in own_rule.RULES.items() if kind is not OSDN]
)
def test_a_rule_is_what_its_token_by_token_form_says(label):
    kind, options = own_rule.RULES[label]
    own = layer(kind, **options)
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    q, k, v, beta, log_gamma = own.operands(x)[:5]
    start = own.start_precond()
    d = torch.zeros(2, 6) if kind is own_rule.FromZero else start
    home = start if issubclass(kind, own_rule.TowardsStart) else 0.0
    S, reads = torch.zeros(2, 6, 6, dtype=torch.float64), []
    for t in range(9):
        key, s = k[0, t], k[0, t] ** 2
        e = v[0, t] - torch.einsum("hkv,hk->hv", S, key)
        S = S + torch.einsum("h,hk,hv->hkv", beta[0, t], d * key, e)
        reads.append(torch.einsum("hkv,hk->hv", S, q[0, t]) / 6**0.5)
        eta = torch.full((2,), options.get("eta", 1.0), dtype=torch.float64)
        if issubclass(kind, own_rule.Normalised):
            eta = eta / (s * s).sum(-1)
        if kind is own_rule.HeadStep:
            eta = 2 * own.logit.sigmoid()
        if kind is own_rule.TokenStep:
            eta = 2 * own.eta_proj(x[0, t]).sigmoid()
        gamma = 1.0 if log_gamma is None else log_gamma[0, t].double().exp()[:, None]
        d = home + gamma * (d - home) + (eta * (1 - (d * s).sum(-1)))[:, None] * s
    expected = own.o_proj(own.o_norm(torch.stack(reads)).flatten(-2))
    torch.testing.assert_close(own(x)[0][0], expected, rtol=1e-9, atol=1e-12)


def test_own_rules_start_from_the_weights_of_osdn(monkeypatch):
    seen = []

    def train(model, recipe, cell):
        seen.append((model, cell.learning_rate, recipe.train.epochs))
        return Outcome(0.5, [0.25, 0.75], 1, False)

    monkeypatch.setattr(own_rule, "train_model", train)
    job = {"seed": 3, "learning_rate": 0.01, "overrides": ["mqar.apf_again.train.epochs=2"]}
    for rule in ("OSDN", "η by token, APF"):
        assert own_rule.run({**job, "rule": rule})["by_pair"] == [0.25, 0.75]
    (osdn, *rest), (own, *also) = seen
    assert rest == also == [0.01, 2]
    assert type(osdn.mixers[1]) is OSDN and type(own.mixers[1]) is own_rule.TokenStep
    assert own.mixers[1].gamma_proj is not None and own.mixers[1].head_dim == 16
    weights = own.state_dict()
    for name, value in osdn.state_dict().items():
        assert torch.equal(weights[name], value), name


def test_the_table_has_differences_by_seed_and_by_the_place_of_the_pair():
    shares = {"OSDN": (0.5, 0.7), "mine": (0.6, 0.9)}
    found = [
        {"rule": rule, "seed": seed, "accuracy": both[seed], "by_pair": [0.2, 0, 0, 0.2 + seed],
         "diverged": rule == "mine"}
        for rule, both in shares.items()
        for seed in (1, 0)
    ]  # fmt: skip
    osdn, mine = own_rule.table(found, ["OSDN", "mine"])["rows"]
    assert osdn == ["OSDN", "2", "0.600, 0.600", "", "+0.500 [-5.853, +6.853]"]
    assert mine[:4] == ["mine", "2, 2 diverged", "0.750, 0.750", "+0.150 [-0.485, +0.785]"]


def test_a_rule_that_changes_is_another_rule(monkeypatch):
    before = own_rule.code("normalised step")
    assert before == own_rule.code("normalised step") != own_rule.code("normalised step, η 0.3")
    monkeypatch.setitem(own_rule.RULES, "normalised step", (own_rule.HeadStep, {}))
    assert own_rule.code("normalised step") != before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--processes", "0"], "at least one process"),
        (["mqar.apf_again.train.epoch=1"], "no field 'epoch'"),
        (["--rules", "none"], "invalid choice"),
    ],
)
def test_a_mistake_is_named_before_anything_is_trained(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        own_rule.main([*words, "--out", str(tmp_path / "own.jsonl")])
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_own_rules_are_compared_and_finished_runs_are_kept(tmp_path):
    kept = tmp_path / "own.jsonl"
    small = [f"mqar.apf_again.train.{x}" for x in ("examples=64", "test_examples=16", "epochs=1")]
    words = ["--seeds", "1", "2", "--rules", "OSDN", "d_1 = 0", "--out", str(kept), *small]
    tables, files = [], []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "examples/own_rule.py", *words],
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."},
        )  # fmt: skip
        tables.append(done.stdout)
        files.append(kept.read_text())
        kept.write_text(files[-1] + '{"cut off by a kill')
    assert "| d_1 = 0 | 2 |" in tables[0] and files[0].count("accuracy") == 4
    assert tables[0] == tables[1] and files[0] == files[1]
