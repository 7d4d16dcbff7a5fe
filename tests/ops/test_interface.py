"""The front door of the rule: what it returns, what it refuses and how."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from osdn.ops import online_scaled_delta_rule
from osdn.ops.interface import HAS_NUMBA
from tests.numerics import assert_close, make_inputs
from tests.ops.running import BOX, detached, everything, outputs

RULES = {"plain": {}, "aware box": {"beta_aware": True, **BOX}, "off": {"eta": 0.0}}


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def good() -> dict:
    """A correct call: B = 2, T = 5, H = 3, K = 4, V = 6."""
    token = {"q": zeros(2, 5, 3, 4), "k": zeros(2, 5, 3, 4), "v": zeros(2, 5, 3, 6)}
    return token | {"beta": zeros(2, 5, 3), "log_gamma": zeros(2, 5, 3)}


def packed(*offsets: int, **kinds) -> dict:
    """A packed call of T = 5 with these offsets."""
    one = {name: x[:1] for name, x in good().items()}
    return one | {"cu_seqlens": torch.tensor(offsets, **kinds)}


REFUSED = {
    "q rank": (
        {"q": zeros(2, 5, 12)},
        "q: expected 4 dimensions [B, T, H, K], got shape (2, 5, 12)",
    ),
    "v rank": ({"v": zeros(2, 5, 3)}, "v: expected 4 dimensions [B, T, H, V], got shape (2, 5, 3)"),
    "k": ({"k": zeros(2, 5, 3, 5)}, "k: expected shape (2, 5, 3, 4) (like q), got (2, 5, 3, 5)"),
    "v": (
        {"v": zeros(2, 4, 3, 6)},
        "v: expected shape (2, 5, 3, 6) ([B, T, H, V]), got (2, 4, 3, 6)",
    ),
    "no V": ({"v": zeros(2, 5, 3, 0)}, "v: expected B, T, H and V of at least 1"),
    "beta": ({"beta": zeros(2, 3, 5)}, "beta: expected shape (2, 5, 3) ([B, T, H]), got (2, 3, 5)"),
    "log_gamma": ({"log_gamma": zeros(2, 5)}, "log_gamma: expected shape (2, 5, 3)"),
    "state": (
        {"initial_state": zeros(1, 3, 4, 6)},
        "initial_state: expected shape (2, 3, 4, 6) ([N, H, K, V]), got (1, 3, 4, 6)",
    ),
    "precond": (
        {"initial_precond": zeros(4)},
        "initial_precond: expected shape (2, 3, 4) ([N, H, K]), got (4,)",
    ),
    "not a tensor": ({"beta": 1.0}, "beta: expected a tensor, got float"),
    "integers": (
        {"beta": zeros(2, 5, 3, dtype=torch.int64)},
        "beta: expected a floating-point tensor, got torch.int64",
    ),
    "dtype": (
        {"k": zeros(2, 5, 3, 4).half()},
        "k: expected dtype torch.float32 like q, got torch.f",
    ),
    "device": (
        {"beta": torch.zeros(2, 5, 3, device="meta")},
        "beta: expected a tensor on cpu like q, got one on meta",
    ),
    "beta_aware": ({"beta_aware": "no"}, "beta_aware: expected True or False, got 'no'"),
    "eta below": ({"eta": -0.1}, "eta: expected a step size in [0, 2], got -0.1"),
    "eta above": ({"eta": 2.5}, "eta: expected a step size in [0, 2], got 2.5"),
    "eta nan": ({"eta": float("nan")}, "eta: expected a finite number, got nan"),
    "one bound": (
        {"precond_max": 2.0},
        "precond_min, precond_max: expected both or neither, got None, 2.0",
    ),
    "bounds": (
        {"precond_min": 2.0, "precond_max": 1.0},
        "precond_min: expected at most precond_max = 1.0, got 2.0",
    ),
    "backend": (
        {"backend": "cuda"},
        "backend: expected one of 'auto', 'reference', 'chunkwise', 'nu",
    ),
}
REFUSED_PACKED = {
    "batch": (
        good() | {"cu_seqlens": torch.tensor([0, 5])},
        "q: expected B = 1 with cu_seqlens, got B = 2; pack along T instead",
    ),
    "rank": (packed(0), "cu_seqlens: expected N + 1 offsets in a vector, got (1,)"),
    "end": (packed(0, 3), "cu_seqlens: expected offsets from 0 to T = 5, got 0 to 3"),
    "start": (packed(1, 5), "cu_seqlens: expected offsets from 0 to T = 5, got 1 to 5"),
    "order": (
        packed(0, 4, 2, 5),
        "cu_seqlens: expected increasing offsets, got 4 then 2 at index 1",
    ),
    "empty": (packed(0, 2, 2, 5), "drop empty sequences"),
    "floats": (
        packed(0, 5, dtype=torch.float32),
        "cu_seqlens: expected int32 or int64, got torch.float32",
    ),
    "device": (
        packed(0, 5, device="meta"),
        "cu_seqlens: expected a tensor on cpu like q, got one on meta",
    ),
    "state": (
        packed(0, 2, 5) | {"initial_state": zeros(1, 3, 4, 6)},
        "initial_state: expected shape (2, 3, 4, 6)",
    ),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED.keys())
def test_bad_arguments_are_named(change, message):
    online_scaled_delta_rule(**good())
    with pytest.raises(ValueError) as error:
        online_scaled_delta_rule(**(good() | change))
    assert message in str(error.value)


@pytest.mark.parametrize("call, message", REFUSED_PACKED.values(), ids=REFUSED_PACKED.keys())
def test_bad_packing_is_named(call, message):
    with pytest.raises(ValueError) as error:
        online_scaled_delta_rule(**call)
    assert message in str(error.value)


def test_no_tokens():
    empty = {name: x[:, :0] for name, x in good().items()}
    with pytest.raises(
        ValueError, match=r"q: expected B, T, H and K of at least 1.*\(2, 0, 3, 4\)"
    ):
        online_scaled_delta_rule(**empty)


WRITES = {"in place": lambda x: x, "data": lambda x: x.data, "numpy": lambda x: x.numpy()}


@pytest.mark.parametrize("written", WRITES.values(), ids=WRITES.keys())
def test_packed_offsets_changed_in_place_are_read_again(backend, written):
    x, offsets = detached(make_inputs(1, 9, 2, 4, 6, sequences=2)), torch.tensor([0, 2, 9])
    before = outputs(x, backend, cu_seqlens=offsets)["o"]
    written(offsets)[1] = 5
    after = outputs(x, backend, cu_seqlens=offsets)["o"]
    written(offsets)[2] = 10**7
    with pytest.raises(ValueError, match="from 0 to T = 9, got 0 to 10000000"):
        outputs(x, backend, cu_seqlens=offsets)
    assert torch.equal(after, outputs(x, backend, cu_seqlens=torch.tensor([0, 5, 9]))["o"])
    assert not torch.equal(after, before)


def test_a_misspelt_option_is_an_error():
    with pytest.raises(TypeError, match="precond_maximum"):
        online_scaled_delta_rule(**good(), precond_maximum=2.0)


@pytest.mark.skipif(not HAS_NUMBA, reason="no numba here")
def test_numba_serves_the_cpu_and_says_so_where_it_cannot():
    x = detached(make_inputs(1, 40, 2, 5, 7, dtype=torch.float32))
    auto, numba = outputs(x, "auto"), outputs(x, "numba")
    assert all(torch.equal(auto[name], numba[name]) for name in auto)
    meta = {name: y.to("meta") for name, y in good().items()}
    with pytest.raises(ValueError, match=r"'numba' needs CPU tensors and numba .* got .* on meta"):
        online_scaled_delta_rule(**meta, backend="numba")


def test_meta_tensors_give_shapes():
    """For counting the parameters and outputs of a model that is never made."""
    meta = {name: y.to("meta") for name, y in good().items()}
    o, S, d = online_scaled_delta_rule(**meta, output_final_state=True)
    assert (o.shape, S.shape, d.shape) == ((2, 5, 3, 6), (2, 3, 4, 6), (2, 3, 4))
    assert o.device.type == "meta"


@pytest.mark.parametrize("packed", [False, True])
def test_the_default_device_is_not_asked(backend, packed):
    x = make_inputs(1, 70, 2, 5, 7, sequences=2 if packed else 1, dtype=torch.float32)
    options = {"cu_seqlens": torch.tensor([0, 33, 70]) if packed else None}
    want = {name: y.detach() for name, y in outputs(x, backend, **options).items()}
    torch.set_default_device("meta")
    try:
        if packed:  # another tensor: nothing is remembered of it
            options["cu_seqlens"] = options["cu_seqlens"].clone()
        got = outputs(x, backend, **options)
        gradient = torch.autograd.grad(got["o"].sum(), x["k"])[0]
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(got[name], y) for name, y in want.items())
    assert gradient.device.type == "cpu"


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_offsets_without_values_give_shapes(device):
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        call = packed(0, 2, 5)
        call = {name: y.clone() for name, y in call.items()}
        o, S, _ = online_scaled_delta_rule(**call, output_final_state=True, backend="chunkwise")
    assert (o.shape, S.shape) == ((1, 5, 3, 6), (2, 3, 4, 6))


def test_inference_mode(backend):
    """Offsets made there have no version counter to tell that they are the ones checked before."""
    x = detached(make_inputs(1, 9, 2, 4, 6, sequences=2))
    with torch.inference_mode():
        got = outputs(x, backend, cu_seqlens=torch.tensor([0, 4, 9]))
        with pytest.raises(ValueError, match="from 0 to T = 9"):
            outputs(x, backend, cu_seqlens=torch.tensor([0, 4, 8]))
    assert_close(got["o"], outputs(x, "reference", cu_seqlens=torch.tensor([0, 4, 9]))["o"], 1e-10)


def test_without_numba_chunkwise_serves(monkeypatch):
    monkeypatch.setattr("osdn.ops.interface.HAS_NUMBA", False)
    x = detached(make_inputs(1, 40, 2, 5, 7, dtype=torch.float32))
    auto, chunkwise = outputs(x, "auto"), outputs(x, "chunkwise")
    assert all(torch.equal(auto[name], chunkwise[name]) for name in auto)
    with pytest.raises(ValueError, match=r"no numba \(pip install 'osdn\[cpu\]'\)"):
        outputs(x, "numba")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_count_of_results(backend, dtype):
    """Always three results; o as v, the states in float32, or float64 for that or the reference."""
    x = detached(make_inputs(2, 9, 2, 4, 6, dtype=dtype))
    states = torch.float64 if dtype == torch.float64 or backend == "reference" else torch.float32
    got = outputs(x, backend)
    assert [y.dtype for y in got.values()] == [dtype, states, states]
    o, *rest = online_scaled_delta_rule(**x, backend=backend)
    assert rest == [None, None] and torch.equal(o, got["o"])


def test_results_share_no_memory_with_arguments(fast_backend):
    """Not even where a state is handed through: η = 0, and no write because k = 0."""
    x = detached(make_inputs(1, 1, 2, 4, 6, gamma=False))
    x["k"] = torch.zeros_like(x["k"])
    before = {name: y.clone() for name, y in x.items() if y is not None}
    for y in outputs(x, fast_backend, eta=0.0).values():
        y.fill_(7.0)
    assert all(torch.equal(x[name], y) for name, y in before.items())


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_every_result_is_written(fast_backend, rule):
    """Bit for bit the same with NaN in all uninitialised memory; odd lengths, packed."""
    x = make_inputs(1, 130, 2, 5, 7, sequences=3, gamma="eta" not in rule, dtype=torch.float32)
    options = rule | {"cu_seqlens": torch.tensor([0, 1, 65, 130])}
    clean = everything(x, fast_backend, **options)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = everything(x, fast_backend, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(clean[name], poisoned[name]) for name in clean)


@pytest.mark.parametrize("name", ["q", "k", "v", "beta", "log_gamma"])
def test_a_nan_comes_out_as_one(backend, name):
    """From its token on, in its head alone (chunkwise: from its chunk of 32 tokens on)."""
    x = detached(make_inputs(2, 70, 2, 5, 7))
    x[name][1, 66, 0] = float("nan")
    got = outputs(x, backend, beta_aware=True, **BOX)
    o = got["o"]
    first = 67 if name == "log_gamma" else 66  # γ_t acts on the writes after t
    assert o[1, first, 0].isnan().all()
    if name != "q":
        assert o[1, first:, 0].isnan().all() and got["final_state"][1, 0].isnan().all()
    o[1, 64 if backend == "chunkwise" else first :, 0] = 0
    assert o.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": [1.0]}, "q: expected a tensor, got list"),
        ({"k": None}, "k: expected a tensor, got NoneType"),
        ({"eta": "1"}, "eta: expected a finite number, got '1'"),
        ({"eta": None}, "eta: expected a finite number, got None"),
        ({"scale": float("nan")}, "scale: expected a finite number, got nan"),
        (
            {"precond_min": float("nan"), "precond_max": 2.0},
            "precond_min: expected a finite number",
        ),
        ({"cu_seqlens": [0, 5]}, "cu_seqlens: expected a tensor, got list"),
    ],
)
def test_wrong_kinds_are_named(change, message):
    x = torch.rand(1, 5, 2, 3)
    given = {"q": x, "k": x, "v": x, "beta": x[..., 0]} | change
    with pytest.raises(ValueError) as error:
        online_scaled_delta_rule(**given)
    assert message in str(error.value)
