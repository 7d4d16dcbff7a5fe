"""Conversion of flash-linear-attention DeltaNet checkpoints."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.cli.main import main
from osdn.data import byte_tokenizer
from osdn.errors import UserError
from osdn.model.convert import convert
from tests.numerics import assert_close

SIZES = {"hidden_size": 64, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 97}


@pytest.fixture
def fla_checkpoint(tmp_path):
    """A checkpoint written by FLA's own classes, with keys long enough to be of unit length."""
    models = pytest.importorskip("fla.models", reason="needs flash-linear-attention")
    torch.manual_seed(0)
    model = models.DeltaNetForCausalLM(models.DeltaNetConfig(**SIZES, allow_neg_eigval=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 if "conv1d" in name else 0.3)
    model.save_pretrained(tmp_path / "fla")
    return tmp_path / "fla"


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def test_converted_model_is_the_delta_net_it_came_from(fla_checkpoint, tmp_path):
    converted = convert(fla_checkpoint, tmp_path / "osdn")
    config = converted.config
    assert (config.head_dim, config.intermediate_size, config.allow_neg_eigval) == (32, 256, True)
    delta_net = OSDNForCausalLM.from_pretrained(
        fla_checkpoint, config=OSDNConfig(**SIZES, mixer="delta_net", allow_neg_eigval=True)
    )
    ids = torch.randint(0, 97, (2, 130), generator=torch.Generator().manual_seed(1))
    expected = logits(delta_net, ids)
    # ‖k‖² = 1 − 1e-6/Σk², so d leaves 1 by about that much; float32 rounding is of the same size.
    assert_close(logits(converted, ids), expected, 2e-5)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "osdn")
    assert isinstance(reloaded, OSDNForCausalLM)
    assert torch.equal(logits(reloaded, ids), logits(converted, ids))
    # ... and it is OSDN all the same: another start of d changes the function.
    with torch.no_grad():
        converted.model.layers[0].attn.initial_precond.fill_(0.5)
    assert (logits(converted, ids) - expected).abs().max() > 1e-2


@pytest.fixture
def fla_gated(tmp_path):
    """FLA's GatedDeltaNet, its checkpoint in tmp_path / "fla"."""
    models = pytest.importorskip("fla.models", reason="needs flash-linear-attention")
    torch.manual_seed(0)
    config = models.GatedDeltaNetConfig(**SIZES, head_dim=24, allow_neg_eigval=True)
    model = models.GatedDeltaNetForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 if "conv1d" in name else 0.3)
            elif name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path / "fla")
    return model


def plain_gated_delta_net(model, ids):
    """What FLA's model computes, by its own modules and its reference: its kernels need a GPU."""
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule as rule

    def norm(x, module):
        return F.rms_norm(x, x.shape[-1:], module.weight, module.eps)

    def convolved(x, module):
        y = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), module.weight, groups=x.shape[-1])
        return F.silu(y).transpose(1, 2).unflatten(-1, (2, -1))

    h = model.model.embeddings(ids)
    for block in model.model.layers:
        a, n = block.attn, norm(h, block.attn_norm)
        q, k = (
            convolved(projection(n), convolution)
            for projection, convolution in ((a.q_proj, a.q_conv1d), (a.k_proj, a.k_conv1d))
        )
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        v = convolved(a.v_proj(n), a.v_conv1d)
        g = -a.A_log.exp() * F.softplus(a.a_proj(n) + a.dt_bias)
        o = rule(q, k, v, 2 * a.b_proj(n).sigmoid(), g)[0]
        o = norm(o, a.o_norm) * F.silu(a.g_proj(n).unflatten(-1, (2, -1)))
        h = h + a.o_proj(o.flatten(-2))
        m, n = block.mlp, norm(h, block.mlp_norm)
        h = h + m.down_proj(F.silu(m.gate_proj(n)) * m.up_proj(n))
    return model.lm_head(norm(h, model.model.norm))


@torch.no_grad()
def test_converted_model_is_the_gated_delta_net_it_came_from(fla_gated, tmp_path):
    converted = convert(tmp_path / "fla", tmp_path / "osdn")
    config = converted.config
    assert (config.mixer, config.state_decay, config.use_output_gate) == ("osdn", "data", True)
    assert (config.head_dim, config.head_v_dim, config.intermediate_size) == (24, 48, 256)
    ids = torch.randint(0, 97, (2, 130), generator=torch.Generator().manual_seed(1))
    expected = plain_gated_delta_net(fla_gated, ids)
    assert_close(logits(converted, ids), expected, 2e-5)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "osdn")
    assert torch.equal(logits(reloaded, ids), logits(converted, ids))
    converted.model.layers[0].attn.initial_precond.fill_(0.5)  # it is OS-GDN all the same
    assert (logits(converted, ids) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_v_heads", 4, "num_v_heads must be num_heads = 2, got 4"),
        ("output_gate_activation", "sigmoid", "output_gate_activation must be 'swish'"),
        ("attnres_block_size", 2, "attnres_block_size must be None"),
        ("head_dim", "absent", "expected a field 'head_dim', found none"),
        ("model_type", "kda", "one of delta_net, gated_deltanet, got 'kda'"),
    ],
)
def test_other_gated_layers_are_refused(fla_gated, tmp_path, field, value, said):
    edit(tmp_path / "fla", **{field: value})
    with pytest.raises(UserError, match=said):
        convert(tmp_path / "fla", tmp_path / "osdn")


def test_forgetting_starts_near_one(fla_checkpoint, tmp_path):
    layer = convert(fla_checkpoint, tmp_path / "osdn", "data").model.layers[1].attn
    assert torch.equal(layer.gamma_proj.bias, torch.full((2,), 6.9))
    assert not layer.gamma_proj.weight.any()


def test_whoever_may_read_one_file_may_load_the_model(fla_checkpoint, tmp_path):
    convert(fla_checkpoint, tmp_path / "osdn")
    assert len({path.stat().st_mode for path in (tmp_path / "osdn").iterdir()}) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("qk_norm", "sum"), ("use_short_conv", False), ("attn", {"layers": [0]})]
)
def test_other_layers_are_refused(fla_checkpoint, tmp_path, field, value):
    path = fla_checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=field):
        convert(fla_checkpoint, tmp_path / "osdn")


def test_pickled_weights_are_refused(fla_checkpoint, tmp_path):
    weights = fla_checkpoint / "model.safetensors"
    torch.save({}, fla_checkpoint / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match="pickle"):
        convert(fla_checkpoint, tmp_path / "osdn")


def test_existing_destination_is_left_alone(fla_checkpoint, tmp_path):
    with pytest.raises(UserError, match="not empty"):
        convert(fla_checkpoint, fla_checkpoint)
    with pytest.raises(UserError, match=r"config\.json"):
        convert(tmp_path / "nowhere", tmp_path / "osdn")


def edit(checkpoint, **fields):
    path = checkpoint / "config.json"
    kept = {k: v for k, v in (json.loads(path.read_text()) | fields).items() if v != "absent"}
    path.write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda x: os.truncate(x / "model.safetensors", 1000), "no model to load"),
        (lambda x: os.truncate(x / "config.json", 40), "not JSON"),
        (lambda x: (x / "config.json").write_text("[]"), "input should be an object, got a list"),
        (lambda x: edit(x, num_heads="absent"), "expected a field 'num_heads', found none"),
        (lambda x: edit(x, num_heads="two"), "num_heads: expected a positive integer, got 'two'"),
        (lambda x: edit(x, num_heads=3), "weights of another shape"),
        (lambda x: edit(x, hidden_size=32), "weights of another shape"),
        (lambda x: edit(x, norm_eps="abc"), "norm_eps: expected a finite number"),
        (lambda x: (x / "tokenizer.json").write_text("{"), "no tokenizer to load"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(fla_checkpoint, tmp_path, capsys, damage, message):
    damage(fla_checkpoint)
    assert main(["convert", str(fla_checkpoint), str(tmp_path / "osdn")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("osdn convert: ") and err.count("\n") == 1 and message in err
    assert [path.name for path in tmp_path.iterdir()] == ["fla"]


def test_a_conversion_is_written_whole_or_not_at_all(fla_checkpoint, tmp_path, capsys, monkeypatch):
    byte_tokenizer().save_pretrained(fla_checkpoint)
    (tmp_path / "file").touch()
    for place in ("file", "file/under"):
        assert main(["convert", str(fla_checkpoint), str(tmp_path / place)]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"osdn convert: {tmp_path / place}: ") and err.count("\n") == 1

    def full(self, directory, **_):
        Path(directory).mkdir()
        (Path(directory) / "config.json").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OSDNForCausalLM, "save_pretrained", full)
    assert main(["convert", str(fla_checkpoint), str(tmp_path / "osdn")]) == 1
    assert "osdn: cannot write there: No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "fla"]
    (tmp_path / "osdn").mkdir()  # an empty one will do
    before = logging.get_verbosity()
    assert main(["convert", str(fla_checkpoint), str(tmp_path / "osdn")]) == 0
    captured = capsys.readouterr()
    assert "parameters, converted from" in captured.out and captured.err == ""
    assert logging.get_verbosity() == before
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "osdn").iterdir()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "fla", "osdn"]
