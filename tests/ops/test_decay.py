"""State decay: S̃_t = α_t S_{t−1} before the erase, in the rule and the step, on every backend."""

import inspect
from itertools import pairwise

import pytest
import torch

from osdn.ops import online_scaled_delta_rule, online_scaled_delta_step
from osdn.ops.interface import BACKENDS
from osdn.ops.operands import Operands
from tests.numerics import assert_close, make_inputs
from tests.ops.running import BOX, assert_all_close, detached, everything, gradients, outputs

RULES = {"free": {}, "aware box": {"beta_aware": True, **BOX}, "off": {"eta": 0.0}}
OFFSETS = (0, 1, 70, 150)
RESETS = {3: -1e4, 40: float("-inf"), 63: -1e4, 64: float("-inf"), 65: -200.0, 100: -30.0}
# numba sums d log α from the last token to the first, where chunkwise sums each part by itself: a
# rounding of 2⁻²⁴ in every ⟨q, dq⟩ and ⟨v, dv⟩ stays (measured: at most 2.3e-6 at 150 tokens).
FLOAT32 = 5e-6


def decaying(T: int, rule: str, packed: bool = False, resets: bool = False, **kinds) -> dict:
    """Inputs with log_alpha; with `resets`, some tokens forget all that came before them."""
    count, sequences = (1, len(OFFSETS) - 1) if packed else (2, None)
    gamma = rule != "off"
    x = make_inputs(count, T, 2, 20, 37, sequences=sequences, gamma=gamma, alpha=True, **kinds)
    with torch.no_grad():
        for t, value in RESETS.items() if resets else ():
            x["log_alpha"][:, t : t + 1, :1] = value  # in one head of two
    return x


@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("rule", RULES)
def test_results_and_gradients_are_the_definitions(fast_backend, rule, packed, resets):
    options = RULES[rule] | ({"cu_seqlens": torch.tensor(OFFSETS)} if packed else {})
    x = decaying(150, rule, packed, resets)
    got = everything(x, fast_backend, **options)
    assert all(y.isfinite().all() for y in got.values())
    expected = everything(x, "reference", **options)
    assert "dlog_alpha" in expected
    assert_all_close(got, expected, 1e-10)


@pytest.mark.parametrize("T", [1, 31, 32, 33, 63, 64, 65, 100, 129])
def test_lengths_around_a_chunk(fast_backend, T):
    x = decaying(T, "free")
    assert_all_close(everything(x, fast_backend), everything(x, "reference"), 1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_float32(fast_backend, rule):
    x = decaying(150, rule, resets=True, dtype=torch.float32)
    got, exact = (
        everything(x, fast_backend, **RULES[rule]),
        everything(x, "reference", **RULES[rule]),
    )
    assert_all_close(got, exact, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_without_decay_every_bit_is_as_it_was(backend, packed, dtype):
    options = {"cu_seqlens": torch.tensor(OFFSETS)} if packed else {}
    x = decaying(150, "free", packed, dtype=dtype)
    x["log_alpha"] = torch.zeros_like(x["log_alpha"], requires_grad=True)
    with_one = everything(x, backend, **options)
    without = everything({n: y for n, y in x.items() if n != "log_alpha"}, backend, **options)
    assert not [name for name, y in without.items() if not torch.equal(with_one[name], y)]


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_gradcheck(backend, packed):
    """All eight inputs, through o and both final states; one α close to a reset."""
    x = make_inputs(1, 7, 2, 3, 2, alpha=True, sequences=2 if packed else 1, seed=4)
    with torch.no_grad():
        x["log_alpha"][:, 4] = -4.0
    options = {"eta": 0.7, "cu_seqlens": torch.tensor([0, 3, 7]) if packed else None}

    def run(*tensors):
        return tuple(outputs(dict(zip(x, tensors)), backend, **options).values())

    assert torch.autograd.gradcheck(run, tuple(x.values()), fast_mode=False)


def test_pieces_equal_the_whole(backend):
    """Cut after every token, at every token of a chunk."""
    T = 37
    x = detached(decaying(T, "free", resets=True))
    whole = outputs(x, backend)
    tokens = ("q", "k", "v", "beta", "log_gamma", "log_alpha")
    for at in range(1, T):
        first = outputs(x | {n: x[n][:, :at] for n in tokens}, backend)
        states = {f"initial_{n}": first[f"final_{n}"] for n in ("state", "precond")}
        second = outputs({n: x[n][:, at:] for n in tokens} | states, backend)
        second["o"] = torch.cat([first["o"], second["o"]], 1)
        assert_all_close(second, whole, 1e-12)


@pytest.mark.parametrize("reset", [-1e4, float("-inf")])
def test_a_reset_begins_a_sequence_of_its_own(backend, reset):
    """From an empty memory; the preconditioner goes on."""
    x = detached(decaying(100, "free"))
    at = (0, 37, 64, 90, 100)
    for t in at[1:-1]:
        x["log_alpha"][:, t] = reset
    whole = outputs(x, backend)
    states = {n: x[n] for n in ("initial_state", "initial_precond")}
    reads = []
    for start, end in pairwise(at):
        piece = {n: y[:, start:end] for n, y in x.items() if n not in states} | states
        result = outputs(piece, backend)
        reads.append(result["o"])
        states["initial_precond"] = result["final_precond"]
        states["initial_state"] = torch.zeros_like(result["final_state"])
    assert_close(torch.cat(reads, 1), whole["o"], 1e-13)
    assert_close(result["final_state"], whole["final_state"], 1e-13)


def test_nothing_reaches_back_over_a_reset(fast_backend):
    """Gradients before it, and its own, are exactly 0 where only later tokens count."""
    x = decaying(100, "off", dtype=torch.float32)
    with torch.no_grad():
        x["log_alpha"][:, 50] = -1e4
    o = outputs(x, fast_backend, eta=0.0)["o"]
    names = ("q", "k", "v", "beta", "log_alpha")
    found = torch.autograd.grad(o[:, 50:].sum(), [x[n] for n in names])
    assert not [n for n, y in zip(names, found) if y[:, :50].any()]
    assert not found[-1][:, 50].any() and found[-1][:, 51:].any()


@pytest.mark.parametrize(
    "function", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"]
)
def test_is_gated_deltanet_in_transformers(backend, function):
    """η = 0, d = 1: Qwen3-Next's rule, which takes [B, T, H, ·] and computes in float32.

    Unwrapped: as imported it hands its work to flash-linear-attention, where that is installed.
    """
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    theirs = inspect.unwrap(getattr(module, function))
    x = detached(decaying(130, "off", dtype=torch.float32))
    x["initial_precond"] = None
    o, state = theirs(
        x["q"], x["k"], x["v"], g=x["log_alpha"], beta=x["beta"],
        initial_state=x["initial_state"], output_final_state=True,
    )  # fmt: skip
    got = outputs(x, backend, eta=0.0)
    assert_close(o, got["o"], 1e-5)
    assert_close(state, got["final_state"], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rule", RULES)
def test_step_by_step_equals_the_rule(backend, rule, dtype):
    x = detached(decaying(30, rule, dtype=dtype))
    x["log_alpha"][:, 11] = float("-inf")
    whole = outputs(x, "reference", **RULES[rule])
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-6}[dtype]
    state, precond = x["initial_state"].clone(), x["initial_precond"].clone()
    for t in range(30):
        token = [None if x[n] is None else x[n][:, t] for n in ("q", "k", "v", "beta", "log_gamma")]
        o, *_ = online_scaled_delta_step(
            *token, log_alpha=x["log_alpha"][:, t], state=state, precond=precond, backend=backend,
            **RULES[rule],
        )  # fmt: skip
        assert_close(o, whole["o"][:, t], tolerance, f"o at {t}")
    assert_close(state, whole["final_state"], tolerance)
    assert_close(precond, whole["final_precond"], tolerance)


def test_padding_changes_nothing(backend):
    x = detached(decaying(40, "free"))
    for name in ("k", "beta", "log_gamma", "log_alpha"):
        x[name][:, 25:] = 0
    whole = outputs(x, backend)
    states = ("initial_state", "initial_precond")
    short = outputs({n: y if n in states else y[:, :25] for n, y in x.items()}, backend)
    for name in ("final_state", "final_precond"):
        assert_close(whole[name], short[name], 1e-14)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_custom_operators(fast_backend, packed):
    options = (0.9, True, BOX["precond_min"], BOX["precond_max"], 0.4)
    offsets = torch.tensor(OFFSETS) if packed else None
    x = decaying(150, "free", packed) | {"cu_seqlens": offsets}
    flat = [x[name] for name in Operands._fields]
    torch.library.opcheck(BACKENDS[fast_backend].rule, (*flat, *options, True))
    flat = [y if y is None else y.detach() for y in flat]
    o, S, d, saved = BACKENDS[fast_backend].rule(*flat, *options, True)
    backward = getattr(torch.ops.osdn, f"{fast_backend}_backward").default
    cotangents = [torch.randn_like(y) for y in (o, S, d)]
    torch.library.opcheck(backward, (*cotangents, *flat, *options, saved))
    if not packed:
        token = [y[:, 0].contiguous() for y in flat[:6]]
        states = [y.clone() for y in flat[6:8]]
        torch.library.opcheck(BACKENDS[fast_backend].step, (*token, *states, None, None, *options))


def test_compiled(fast_backend):
    x = decaying(70, "free", dtype=torch.float32)

    def run(**given):
        return online_scaled_delta_rule(**given, output_final_state=True, backend=fast_backend)

    fast = torch.compile(run, fullgraph=True, backend="aot_eager")
    names = ("o", "final_state", "final_precond")
    got, want = (dict(zip(names, f(**x))) for f in (fast, run))
    pairs = [(got, want), (gradients(x, got), gradients(x, want))]
    assert not [n for a, b in pairs for n in b if not torch.equal(a[n], b[n])]


def test_autocast_leaves_the_gate_alone(fast_backend):
    x = detached(decaying(70, "free", dtype=torch.float32))
    rounded = {n: y.bfloat16() if n in "qkv" else y for n, y in x.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outputs(x, fast_backend)
    assert all(torch.equal(got[n], y) for n, y in outputs(rounded, fast_backend).items())


def test_a_nan_comes_out_as_one(backend):
    x = detached(decaying(70, "free"))
    x["log_alpha"][1, 66, 0] = float("nan")
    got = outputs(x, backend)
    assert got["o"][1, 66:, 0].isnan().all() and got["final_state"][1, 0].isnan().all()
    got["o"][1, 64 if backend == "chunkwise" else 66 :, 0] = 0
    assert got["o"].isfinite().all() and got["final_precond"].isfinite().all()


def test_what_the_front_door_refuses():
    x = detached(decaying(5, "free", dtype=torch.float32))
    with pytest.raises(ValueError, match=r"log_alpha: expected shape \(2, 5, 2\) \(\[B, T, H\]\)"):
        online_scaled_delta_rule(**x | {"log_alpha": x["log_alpha"][:, :4]})
    with pytest.raises(ValueError, match="log_alpha: expected a tensor, got float"):
        online_scaled_delta_rule(**x | {"log_alpha": -1.0})
