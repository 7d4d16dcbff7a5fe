"""Modules in other precisions, on other devices, exported: what is computed stays the same."""

import copy
import os
import sysconfig
from pathlib import Path
from shutil import which

import pytest
import torch
from torch import nn

from osdn.layers.attention import Attention
from osdn.layers.osdn import OSDN
from tests.model.tiny import MIXERS, build, plain_loss, tokens
from tests.numerics import assert_close


@pytest.mark.parametrize("kind", ["osdn", "os_gdn", "delta_net", "attention"])
def test_gradcheck_of_a_layer(kind):
    """In float64 nothing on the way is in float32: neither gates nor rotary positions."""
    torch.manual_seed(0)
    if kind == "attention":
        layer = Attention(8, 2, rope_theta=10.0)
    else:
        options = {"adaptive": False} if kind == "delta_net" else {"forgetting": "data"}
        options |= {"state_decay": "data"} if kind == "os_gdn" else {}
        layer = OSDN(8, 2, use_output_gate=True, **options)
        layer.backend = "chunkwise"
    layer.double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.ndim > 1 and "precond" not in name:
                parameter.normal_(std=0.5)
    names, parameters = zip(*layer.named_parameters())
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)

    def forward(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), (x,))[0]

    assert torch.autograd.gradcheck(forward, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_weights_in_bfloat16_with_norms_in_float32(mixer):
    """Without autocast; as exact as with all in bfloat16."""
    exact, ids = build(mixer, forgetting="data", use_output_gate=True), tokens()
    expected = exact(ids).logits
    model = build(mixer, forgetting="data", use_output_gate=True).bfloat16()
    error = (model(ids).logits.float() - expected).norm()
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.float()
    result = model(ids, use_cache=True)
    assert result.logits.dtype == torch.bfloat16
    assert (result.logits.float() - expected).norm() <= 1.5 * error
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_a_model_on_the_meta_device_has_a_loss(mixer, training):
    model, ids = build(mixer).to("meta").train(training), tokens().to("meta")
    mask = torch.ones_like(ids)
    result = model(ids, labels=ids, attention_mask=mask)
    assert result.loss.is_meta and result.loss.shape == ()
    result.loss.backward()
    assert {p.grad.shape == p.shape for p in model.parameters()} == {True}


class Quantised(torch.Tensor):
    """A weight whose values are not those of its memory: half of what it stands for is stored."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        plain = [x.as_subclass(torch.Tensor) if isinstance(x, Quantised) else x for x in arguments]
        if function is torch.nn.functional.linear:
            plain[1] = 2 * plain[1]
        return function(*plain, **options or {})


def test_the_loss_is_by_a_head_that_is_quantised():
    """Through its own product, in training too; the loss in chunks would read its memory."""
    model, ids = build().train(), tokens()
    weight = model.lm_head.weight.detach()
    del model.lm_head.weight
    model.lm_head.weight = weight.as_subclass(Quantised)
    hidden = model.model(ids).last_hidden_state
    expected = plain_loss(hidden @ (2 * weight).T, ids)
    assert_close(model(ids, labels=ids).loss, expected, 1e-5)


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "b_proj"])
def test_projections_that_are_quantised_are_used_by_their_own_product(name):
    """In training too, where those that are plain weights are joined into one."""
    layer, x = build().model.layers[0].attn.train(), torch.randn(1, 9, 32)
    projection = getattr(layer, name)
    doubled = copy.deepcopy(layer)
    getattr(doubled, name).weight.data.mul_(2)
    weight = projection.weight.detach()
    del projection.weight
    projection.weight = weight.as_subclass(Quantised)
    assert_close(layer(x)[0], doubled(x)[0], 1e-6)


def exported(model, backend):
    """The model as torch.export makes it from 21 tokens, for 2 to 4,096."""
    for module in model.modules():
        if isinstance(module, OSDN):
            module.backend = backend
    T = torch.export.Dim("T", min=2, max=4096)
    return torch.export.export(
        model,
        (tokens(),),
        {"use_cache": False},
        dynamic_shapes={"input_ids": {1: T}, "use_cache": None},
    )


@pytest.mark.parametrize("backend", ["chunkwise", "numba"])
@pytest.mark.parametrize(
    ("mixer", "trainable"), [*((mixer, False) for mixer in MIXERS), ("osdn", True)], ids=str
)
def test_an_exported_model_takes_any_length(mixer, backend, trainable):
    """Chunks of every size (8, 16, 32 tokens); where weights are trainable with their gradients."""
    model = build(mixer, forgetting="data").requires_grad_(trainable)
    program = exported(model, backend).module()
    for length in (2, 3, 8, 9, 16, 17, 21, 70):
        ids = tokens(2, length, seed=length)
        found, expected = program(ids, use_cache=False).logits, model(ids).logits
        assert_close(found, expected, 1e-5, f"T={length}")
        if trainable:
            named = dict(program.named_parameters())
            theirs = torch.autograd.grad(found.square().sum(), list(named.values()))
            own = torch.autograd.grad(
                expected.square().sum(), [model.get_parameter(name) for name in named]
            )
            for name, one, other in zip(named, theirs, own):
                assert_close(one, other, 1e-5, f"T={length}, gradient of {name}")


@pytest.mark.slow
@pytest.mark.skipif(
    which(os.environ.get("CXX", "g++")) is None
    or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="Inductor needs a C++ compiler and Python's headers",
)
@pytest.mark.parametrize("backend", ["chunkwise", "numba"])
def test_a_model_compiled_ahead_of_time_takes_any_length(backend, tmp_path):
    """AOTInductor, whose program calls the operator through PyTorch's dispatcher."""
    model = build(["osdn", "attention"], forgetting="data").requires_grad_(False)
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(exported(model, backend), package_path=path)
    program = torch._inductor.aoti_load_package(path)
    for length in (2, 21, 70):
        ids = tokens(2, length, seed=length)
        assert_close(program(ids, use_cache=False).logits, model(ids).logits, 1e-5, f"T={length}")
