"""The short convolution: PyTorch's against conv1d sequence by sequence, the kernels against it."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from osdn.ops import convolution
from osdn.ops.convolution import next_history, short_convolution
from tests.numerics import assert_close

triton = pytest.importorskip("osdn.ops.triton.convolution", reason="Triton cannot be installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """So that the interpreter's small cases have several runs and blocks of them."""
    if DEVICE == "cpu":
        for name in ("FORWARD", "BACKWARD"):
            monkeypatch.setattr(triton, name, {**getattr(triton, name), "length": 8})


def make(B, T, D, W, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(B, T, D, generator=generator).to(dtype) for _ in range(2))
    return x, torch.randn(D, W, generator=generator), dy


def expected(x, weight, cu_seqlens, head_dim):
    """The definition, by conv1d, in float64, for every sequence alone."""
    ends = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    made = []
    for begin, end in pairwise(ends):
        if begin == end:
            continue
        one = F.pad(x[:, begin:end].double().mT, (weight.shape[1] - 1, 0))
        made.append(F.silu(F.conv1d(one, weight.double()[:, None], groups=len(weight))).mT)
    z = torch.cat(made, 1)
    if head_dim is None:
        return z
    heads = z.unflatten(-1, (-1, head_dim))
    return (heads / (heads.square().sum(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2)


def with_gradients(run, x, weight, dy, *options):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = run(x, weight, *options)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy.to(y.dtype))
    return {"y": y.detach(), "dx": dx, "dweight": dweight}


CASES = [
    # B, T, D, W, head_dim, cu_seqlens
    (2, 7, 12, 4, 6, None),
    (1, 2, 5, 4, None, None),
    (2, 1, 6, 3, 3, None),
    (1, 9, 4, 1, 2, None),
    (1, 40, 12, 4, 4, [0, 1, 3, 3, 20, 40, 40]),
    (1, 33, 6, 4, None, [0, 2, 33]),
    (1, 200, 48, 4, 24, [0, 85, 88, 200]),
    (2, 70, 140, 4, None, None),
    (1, 20, 300, 5, 300, None),
]


@pytest.mark.parametrize(("B", "T", "D", "W", "head_dim", "ends"), CASES)
def test_pytorch_is_conv1d_of_each_sequence(B, T, D, W, head_dim, ends):
    x, weight, dy = make(B, T, D, W)
    weight = weight.double()
    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    actual = with_gradients(
        lambda x, w: short_convolution(x, w, cu_seqlens, head_dim=head_dim), x, weight, dy
    )
    exact = with_gradients(expected, x, weight, dy, cu_seqlens, head_dim)
    for name, value in exact.items():
        assert_close(actual[name], value, 1e-12, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("B", "T", "D", "W", "head_dim", "ends"), CASES)
def test_kernels(B, T, D, W, head_dim, ends, dtype):
    x, weight, dy = (one.to(DEVICE) for one in make(B, T, D, W, dtype))
    cu_seqlens = None if ends is None else torch.tensor(ends, device=DEVICE)
    exact = with_gradients(expected, x.double(), weight.double(), dy, cu_seqlens, head_dim)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
    try:
        y = triton.forward(x, weight, cu_seqlens, head_dim)
        dx, dweight = triton.backward(dy, x, weight, cu_seqlens, head_dim)
    finally:
        torch.use_deterministic_algorithms(before)
    assert y.dtype == dx.dtype == dtype and dweight.dtype == weight.dtype
    limit = 2e-6 if dtype == torch.float32 else 1e-3
    for name, value in {"y": y, "dx": dx, "dweight": dweight}.items():
        assert_close(value, exact[name], limit, name)


@pytest.mark.parametrize("backward", [convolution.backward, triton.backward])
def test_gradients_are_contiguous(backward):
    """As the operator promises a compiler; and fused AdamW wants its weight's strides."""
    x, weight, dy = (one.to(DEVICE) for one in make(2, 9, 12, 4, torch.float32))
    for gradient, like in zip(backward(dy, x, weight, None, 4), (x, weight), strict=True):
        assert gradient.stride() == torch.empty_like(like).stride()


def test_zeros_stay_zeros_and_bfloat16_is_rounded_once():
    x, weight, _ = make(1, 5, 4, 4, torch.bfloat16)
    y = short_convolution(x, weight, head_dim=2)
    assert y.dtype == torch.bfloat16
    assert_close(y, expected(x, weight, None, 2), 2e-3)  # half of its 2^-8, on average less
    assert not short_convolution(torch.zeros_like(x), weight, head_dim=2).any()


def test_a_nan_stays_in_its_sequence():
    x, weight, _ = make(1, 8, 4, 4)
    x[0, 2] = float("nan")
    y = short_convolution(x, weight, torch.tensor([0, 3, 8]), head_dim=4)
    assert y[0, 2].isnan().all() and y[0, 3:].isfinite().all()


def test_compiled_is_eager():
    x, weight, dy = make(1, 24, 12, 4, torch.float32)
    given = x, weight, dy, torch.tensor([0, 5, 24])
    run = lambda x, w, c: short_convolution(x, w, c, head_dim=6)  # noqa: E731
    eager = with_gradients(run, *given)
    compiled = with_gradients(torch.compile(run, backend="aot_eager", fullgraph=True), *given)
    for name, value in eager.items():
        assert torch.equal(compiled[name], value), name


@pytest.mark.parametrize("f", [torch.sum, lambda y: y.square().sum()], ids=["linear", "square"])
def test_second_derivatives_are_refused(f):
    """A linear function's gradient has no graph of its own, and 0 would come out of that."""
    x, weight, _ = make(1, 6, 4, 3)
    with pytest.raises(RuntimeError, match="short_convolution can be differentiated once"):
        torch.autograd.functional.hessian(lambda x: f(short_convolution(x, weight)), x)


def test_opcheck():
    x, weight, _ = make(1, 6, 4, 3, torch.float32)
    x.requires_grad_(), weight.requires_grad_()
    given = (x, [weight[:2], weight[2:3]], torch.tensor([0, 2, 6]), [2, 0])
    torch.library.opcheck(torch.ops.osdn.short_convolution.default, given)


HISTORIES = [
    # B, T, D, W, head_dim, cu_seqlens
    (2, 7, 12, 4, 6, None),
    (2, 1, 6, 4, None, None),
    (1, 40, 12, 4, 4, [0, 1, 3, 20, 40]),
    (1, 33, 6, 3, None, [0, 2, 33]),
    (1, 5, 4, 1, 2, [0, 2, 5]),
]


def with_history(D, N, W, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, D, W - 1, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize(("B", "T", "D", "W", "head_dim", "ends"), HISTORIES)
def test_a_history_equals_the_inputs_before(B, T, D, W, head_dim, ends):
    """Each sequence by itself with its history in front; values and all three gradients."""
    x, weight, dy = (one.to(DEVICE) for one in make(B, T, D, W))
    history = with_history(D, B if ends is None else len(ends) - 1, W)
    leaves = [y.double().requires_grad_() for y in (x, weight, history)]
    cu_seqlens = None if ends is None else torch.tensor(ends, device=DEVICE)
    y = short_convolution(*leaves[:2], cu_seqlens, head_dim=head_dim, history=leaves[2])
    pieces = [(b, 0, T) for b in range(B)] if ends is None else [(0, *p) for p in pairwise(ends)]
    alone = []
    for n, (b, begin, end) in enumerate(pieces):
        one = torch.cat([leaves[2][n].T, leaves[0][b, begin:end]])[None]
        alone.append(short_convolution(one, leaves[1], head_dim=head_dim)[:, W - 1 :])
    separate = torch.cat(alone, 0 if ends is None else 1)
    assert_close(y, separate, 1e-14)  # a vector of SiLU and its remainder round differently
    got, want = (torch.autograd.grad(one, leaves, dy.double()) for one in (y, separate))
    for actual, wanted, name in zip(got, want, ("x", "weight", "history")):
        assert_close(actual, wanted, 1e-13, name)


@pytest.mark.parametrize(("B", "T", "D", "W", "head_dim", "ends"), HISTORIES)
def test_the_next_history_goes_on(B, T, D, W, head_dim, ends):
    """Two calls, the second with what next_history gives, equal one over the joined sequences."""
    x, weight, _ = (one.to(DEVICE) for one in make(B, T, D, W))
    more, *_ = (one.to(DEVICE) for one in make(B, T, D, W))
    cu_seqlens = None if ends is None else torch.tensor(ends, device=DEVICE)
    history = next_history(x, W, cu_seqlens)
    second = short_convolution(more, weight, cu_seqlens, head_dim=head_dim, history=history)
    pieces = [(b, 0, T) for b in range(B)] if ends is None else [(0, *p) for p in pairwise(ends)]
    for n, (b, begin, end) in enumerate(pieces):
        joined = torch.cat([x[b, begin:end], more[b, begin:end]])[None]
        want = short_convolution(joined, weight, head_dim=head_dim)[0, end - begin :]
        got = second[n] if ends is None else second[0, begin:end]
        assert_close(got, want, 1e-14)
        longer = torch.cat([x.new_zeros(W - 1, D), joined[0]])
        after = next_history(more, W, cu_seqlens, history)
        assert torch.equal(after[n].T, longer[len(longer) - W + 1 :])


def test_a_history_of_another_shape_is_named():
    x, weight, _ = make(1, 9, 4, 3)
    with pytest.raises(ValueError, match=r"history: expected shape \(2, 4, 2\) .* got \(1, 4, 2\)"):
        short_convolution(x, weight, torch.tensor([0, 3, 9]), history=torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match="cu_seqlens: expected offsets from 0 to T = 9"):
        short_convolution(x, weight, torch.tensor([0, 3, 8]), history=torch.zeros(2, 4, 2))


def test_a_history_in_one_compiled_graph():
    x, weight, _ = (one.to(DEVICE) for one in make(1, 9, 4, 3))
    history, offsets = with_history(4, 2, 3), torch.tensor([0, 3, 9], device=DEVICE)
    run = lambda at: short_convolution(x, weight, at, history=history)  # noqa: E731
    fast = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(fast(offsets), run(offsets))
