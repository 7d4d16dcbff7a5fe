"""The Triton kernels on what is rare: hard resets, NaN, strided and unversioned index tensors."""

import os
from math import inf

import pytest
import torch

pytest.importorskip("triton", reason="Triton cannot be installed here")

from osdn.ops import online_scaled_delta_rule, online_scaled_delta_step, packing
from osdn.ops.triton import chunks
from osdn.ops.triton.chunks import CHUNK, cut, tile
from osdn.ops.triton.memory_gradients import gradients_kernel
from tests.numerics import assert_close, make_inputs
from tests.ops.running import BOX, detached, everything, outputs
from tests.ops.running_triton import DEVICE, check, on_device, poisoned_memory  # noqa: F401


@pytest.mark.parametrize("options", [{}, {"precond_min": 0.2, "precond_max": 1.8}])
@pytest.mark.parametrize(
    "reset, share, otherwise",
    [
        (-1e4, 0.3, -0.1),  # chunkwise's "beyond exp"
        (-1e9, 0.1, -1e-3),
        (float("-inf"), 0.1, -1e-3),
        (-50.0, 0.1, -1e-3),
        (-9.7, 0.5, -0.3),
        (-50.0, 1.0, 0.0),
    ],
)
def test_forgetting_from_none_to_all(reset, share, otherwise, options):
    """As near as ever, 2e-7 where measured: no sum of log γ takes the digits of those after it."""
    x = detached(make_inputs(1, 100, 1, 16, 16, dtype=torch.float32))
    g = torch.Generator().manual_seed(3)
    values = torch.where(torch.rand(100, generator=g) < share, reset, otherwise)
    check(x | {"log_gamma": values.view(1, 100, 1)}, **options)


@pytest.mark.parametrize(
    "name",
    [
        "k",
        "log_alpha",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("q", "v", "beta", "log_gamma")),
    ],
)
def test_a_nan_comes_out_as_one(name):
    """From its token on, in its head alone (and in the earlier tokens of its chunk of 64)."""
    x = detached(make_inputs(1, 70, 2, 16, 16, alpha=name == "log_alpha", dtype=torch.float32))
    x[name][0, 66, 0] = float("nan")
    got = outputs(on_device(x), "triton", beta_aware=True, **BOX)
    o = got["o"].detach()
    first = 67 if name == "log_gamma" else 66  # γ_t acts on the writes after t
    assert o[0, first, 0].isnan().all()
    if name != "q":
        assert o[0, first:, 0].isnan().all() and got["final_state"][0, 0].isnan().all()
    if name in ("k", "beta", "log_gamma"):
        assert got["final_precond"][0, 0].isnan().any()
    o[0, 64:, 0] = 0
    assert o.isfinite().all()


def test_a_nan_survives_the_box_of_a_step():
    x = detached(on_device(make_inputs(1, 1, 2, 16, 16, dtype=torch.float32)))
    token = [x[name][:, 0] for name in ("q", "k", "v", "beta", "log_gamma")]
    token[1][0, 0] = float("nan")
    state, precond = x["initial_state"].clone(), x["initial_precond"].clone()
    online_scaled_delta_step(*token, state=state, precond=precond, backend="triton", **BOX)
    assert precond[0, 0].isnan().all() and precond[0, 1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_strided_offsets(dtype):
    offsets = torch.tensor([0, 1, 66, 80], device=DEVICE, dtype=dtype)
    strided = torch.stack([offsets, offsets + 7], 1)[:, 0]
    x = detached(on_device(make_inputs(1, 80, 1, 16, 16, sequences=3, dtype=torch.float32)))
    want, got = (outputs(x, "triton", cu_seqlens=at) for at in (offsets, strided))
    assert not strided.is_contiguous()
    assert all(torch.equal(got[name], y) for name, y in want.items())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_strided_slots(dtype):
    x = detached(on_device(make_inputs(2, 1, 1, 16, 16, dtype=torch.float32)))
    token = [x[name][:, 0] for name in ("q", "k", "v", "beta", "log_gamma")]
    states = []
    spread = torch.tensor([1, -1, 0, -1], device=DEVICE, dtype=dtype)[::2]
    for slots in (spread.contiguous(), spread):
        state, precond = x["initial_state"].clone(), x["initial_precond"].clone()
        o, *_ = online_scaled_delta_step(
            *token, state=state, precond=precond, slots=slots, backend="triton"
        )
        states.append((o, state, precond))
    assert not spread.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(*states))


def test_offsets_of_inference_mode_are_not_remembered():
    """They have no version counter, which would tell that they have changed."""
    x = detached(on_device(make_inputs(1, 9, 1, 16, 16, sequences=2, dtype=torch.float32)))
    with torch.inference_mode():
        offsets = torch.tensor([0, 4, 9], device=DEVICE)
        got = [outputs(x, "triton", cu_seqlens=offsets)["o"]]
        offsets[1] = 5
        got.append(outputs(x, "triton", cu_seqlens=offsets)["o"])
    for middle, o in zip((4, 5), got):
        fresh = torch.tensor([0, middle, 9], device=DEVICE)
        assert_close(o, outputs(x, "reference", cu_seqlens=fresh)["o"], 5e-6)


def test_a_captured_graph_makes_its_own_tables(monkeypatch):
    """Neither read from the cache, or a replay would not follow the offsets, nor kept in it."""
    offsets = torch.tensor([0, 4, 9], device=DEVICE)
    before = cut(1, 9, offsets)
    monkeypatch.setattr(packing, "capturing", lambda x: True)
    assert cut(1, 9, offsets) is not before
    monkeypatch.undo()
    assert cut(1, 9, offsets) is before


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_replayed_graph_follows_its_offsets():
    x = detached(on_device(make_inputs(1, 80, 1, 16, 16, sequences=2, dtype=torch.float32)))
    offsets = torch.tensor([0, 70, 80], device=DEVICE)
    run = lambda at: online_scaled_delta_rule(**x, cu_seqlens=at, backend="triton")[0]  # noqa: E731
    run(offsets)  # compiled, and the tables of these offsets are in the cache
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = run(offsets)
    offsets[1] = 3
    graph.replay()
    assert torch.equal(o, run(offsets.clone()))


def test_resets_in_a_walk_of_segments(monkeypatch):
    monkeypatch.setattr(chunks, "LEAST", 1)
    monkeypatch.setattr(chunks, "LONG", 2)
    x = detached(make_inputs(1, 257, 1, 16, 16, dtype=torch.float32))
    x["log_gamma"][:, 70:200:9] = float("-inf")
    check(x)


RESETS = {3: -1e4, 40: -inf, 63: -1e4, 64: -inf, 65: -200.0, 100: -30.0}


def _decaying(T: int, K: int = 16, V: int = 20, H: int = 1, **kinds) -> dict:
    """Inputs with log_alpha, of which some tokens of head 0 forget all that came before them."""
    x = detached(make_inputs(1, T, H, K, V, alpha=True, dtype=torch.float32, **kinds))
    for t, value in RESETS.items():
        if t < T:
            x["log_alpha"][:, t, 0] = value
    return x


@pytest.mark.parametrize(
    "T, K, V, options",
    [
        (1, 16, 16, {}),
        (66, 20, 70, {"beta_aware": True}),
        pytest.param(130, 40, 16, BOX, marks=pytest.mark.slow),
        (70, 16, 16, {"eta": 0.0}),
    ],
)
def test_decay_of_the_state(T, K, V, options):
    check(_decaying(T, K, V, H=2 if T == 66 else 1, gamma="eta" not in options), **options)


def test_decay_of_packed_sequences(monkeypatch):
    monkeypatch.setattr(chunks, "SPAN", 2)
    offsets = torch.tensor([0, 1, 66, 210], device=DEVICE)
    check(_decaying(210, sequences=3), cu_seqlens=offsets)


def test_decay_in_segments(monkeypatch):
    """Of two chunks each, whose maps decay too."""
    monkeypatch.setattr(chunks, "SPAN", 2)
    monkeypatch.setattr(chunks, "LEAST", 1)
    monkeypatch.setattr(chunks, "LONG", 2)
    check(_decaying(270))


def test_decay_in_half_precision():
    x = _decaying(130)
    check(x | {name: x[name].half() for name in "qkv"})


def test_nothing_reaches_back_over_a_reset():
    """Gradients before it, and its own, are exactly 0 where only later tokens count."""
    x = on_device(_decaying(140, gamma=False))
    o = outputs(x, "triton", eta=0.0)["o"]
    names = ("q", "k", "v", "beta", "log_alpha")
    found = torch.autograd.grad(o[:, 64:].sum(), [x[n] for n in names])
    assert not [n for n, y in zip(names, found) if y[:, :64].any()]
    assert not found[-1][:, 64].any() and found[-1][:, 66:].any()


def test_no_decay_changes_nothing():
    """α = 1 is the rule without α, in every bit where products and sums are rounded alike."""
    x = detached(make_inputs(1, 130, 1, 16, 20, dtype=torch.float32))
    want = everything(on_device(x), "triton")
    got = everything(on_device(x | {"log_alpha": torch.zeros(1, 130, 1)}), "triton")
    assert got["dlog_alpha"].isfinite().all()
    if DEVICE == "cpu":
        assert not [name for name, y in want.items() if not torch.equal(got[name], y)]
    else:  # one sum is added up in another order
        for name, y in want.items():
            assert_close(got[name], y, 1e-6, name)


@pytest.mark.skipif(DEVICE != "cpu", reason="4 GiB are cheap only where they are never touched")
def test_offsets_of_more_than_2_31_numbers(tmp_path):
    """The second of the two triangles lies B T H 64 numbers behind the first."""
    K, rows = 16, 2**25
    path = tmp_path / "sparse"
    path.touch()
    # A file without blocks, as long before the tensor as behind it: a negative offset reads zeros.
    os.truncate(path, 2 * (2**32 + CHUNK))
    whole = torch.from_file(str(path), shared=True, size=2**32 + CHUNK, dtype=torch.float16)
    read_by = whole[2**31 :]
    read_by[rows * CHUNK] = 1
    zeros, w = torch.zeros(K, dtype=torch.float16), torch.arange(K, dtype=torch.float16)
    kept, ends, sums = torch.zeros(K, K, dtype=torch.float16), torch.ones(2), torch.zeros(2)
    dq, dk = torch.empty_like(w), torch.empty_like(w)
    gradients_kernel[(1,)](
        zeros, zeros, w, ends, zeros, zeros, zeros, kept, read_by, kept, dq, dk, sums, sums[1:],
        None, None, 1.0, 1.0, 1, rows, H=1, K=K, V=K, BT=CHUNK, BK=tile(K), BV=tile(K), SPAN=1,
        IS_VARLEN=False, HAS_ALPHA=True, PREC="tf32",
    )  # fmt: skip
    assert torch.equal(dk, w) and not dq.any()
