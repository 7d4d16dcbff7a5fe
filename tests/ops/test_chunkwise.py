"""What is special to the chunkwise backend: repair of the clip, decay without overflow, memory.

That it agrees with the definition for every option is tested with the other backends.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from osdn.ops import chunkwise, reference
from osdn.ops.operands import Operands, Options, Token
from tests.numerics import assert_close, make_inputs
from tests.ops.running import assert_all_close, detached, everything

EXACT = 1e-10


def violated(inputs: dict, rule: Options) -> torch.Tensor:
    """[B, H, T]: where the clip moved some feature, in the float64 recurrence."""
    x = detached(inputs)
    d, hits = x["initial_precond"].double(), []
    for t in range(x["k"].shape[1]):
        gate = None if x["log_gamma"] is None else x["log_gamma"][:, t].double()
        now = d, x["k"][:, t].double(), x["beta"][:, t].double(), gate
        free = reference.adapt(*now, rule._replace(precond_min=None, precond_max=None))
        d = reference.adapt(*now, rule)
        hits.append((free != d).any(-1))
    return torch.stack(hits, -1)


@pytest.mark.parametrize("gamma", [True, False])
@pytest.mark.parametrize(
    "box, chunks_hit",
    [((-9.0, 9.0), "none"), ((0.25, 1.9), "some"), ((0.9, 1.1), "all"), ((1.0, 1.0), "all")],
)
def test_clip_is_exact_however_many_chunks_it_hits(box, chunks_hit, gamma):
    x = make_inputs(3, 161, 3, 24, 8, gamma=gamma, unit_keys=False)
    options = {"precond_min": box[0], "precond_max": box[1], "beta_aware": gamma}
    hits = violated(x, Options(1.0, gamma, *box, 1.0))[..., :160].unflatten(-1, (-1, 32)).any(-1)
    share = hits.double().mean().item()
    assert {"none": share == 0, "some": 0.05 < share < 0.95, "all": share == 1}[chunks_hit], share
    assert_all_close(
        everything(x, "chunkwise", **options), everything(x, "reference", **options), EXACT
    )


@pytest.mark.parametrize("at", [0, 31, 32, 45, 63, 69])
def test_one_violation_in_one_row(at):
    """Unit keys from d = 1 leave d alone; one long key at one token of one head leaves the box."""
    x = make_inputs(2, 70, 2, 6, 5, gamma=False)
    with torch.no_grad():
        x["initial_precond"].fill_(1.0)
        x["k"][1, at, 0] *= 2
    options = {"precond_min": 0.3, "precond_max": 1.7}
    hits = violated(x, Options(1.0, False, 0.3, 1.7, 1.0))
    assert hits.sum() >= 1 and hits.nonzero()[0].tolist() == [1, 0, at]
    assert_all_close(
        everything(x, "chunkwise", **options), everything(x, "reference", **options), EXACT
    )


def with_log_gamma(kind: str, dtype: torch.dtype) -> dict:
    x = make_inputs(2, 100, 2, 8, 6, dtype=dtype)
    g = torch.Generator().manual_seed(3)
    values = {
        "no forgetting": torch.zeros(100),
        "total": torch.full((100,), -50.0),
        "one in ten": torch.where(torch.rand(100, generator=g) < 0.1, -50.0, -1e-3),
        "a run, then hardly any": torch.where(torch.arange(100) % 32 < 20, -50.0, -1e-3),
        "beyond exp": torch.where(torch.rand(100, generator=g) < 0.3, -1e4, -0.1),
    }[kind]
    with torch.no_grad():
        x["log_gamma"].copy_(values[None, :, None].expand(2, 100, 2))
    return x


@pytest.mark.parametrize("options", [{}, {"precond_min": 0.2, "precond_max": 1.8}])
@pytest.mark.parametrize(
    "kind", ["no forgetting", "total", "one in ten", "a run, then hardly any", "beyond exp"]
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, EXACT), (torch.float32, 2e-6)])
def test_forgetting_from_none_to_all(kind, dtype, tolerance, options):
    x = with_log_gamma(kind, dtype)
    got = everything(x, "chunkwise", **options)
    assert all(y.isfinite().all() for y in got.values())
    assert_all_close(got, everything(x, "reference", **options), tolerance)


@pytest.mark.parametrize("gamma", [True, False])
@pytest.mark.parametrize("options", [{}, {"eta": 0.0}, {"precond_min": 0.8, "precond_max": 1.2}])
def test_very_uneven_pack(options, gamma):
    cu_seqlens = torch.tensor([0, 1, 1001, 1064, 1128, 1193])
    x = make_inputs(1, 1193, 2, 6, 5, sequences=5, gamma=gamma)
    options = options | {"cu_seqlens": cu_seqlens}
    assert_all_close(
        everything(x, "chunkwise", **options), everything(x, "reference", **options), EXACT
    )


@pytest.mark.parametrize("options", [{}, {"precond_min": 0.5, "precond_max": 1.5}])
def test_float32_accuracy(options):
    """A few units of float32's last place, 1.2e-7, in every result and gradient of 1000 tokens."""
    x = make_inputs(1, 1000, 2, 64, 48, dtype=torch.float32)
    assert_all_close(
        everything(x, "chunkwise", **options), everything(x, "reference", **options), 1e-6
    )


@pytest.mark.parametrize("beta, tolerance", [(1.0, 5e-6), (2.0, 1e-4)])
def test_the_same_key_for_ever(beta, tolerance):
    """The worst conditioned chunk, every product of keys 1; a sum of powers of U would be useless.

    With β = 2 nothing ever decays, so that every rounding stays: the recurrence token by token in
    float32 (numba) is at 5e-6 there, against 5e-7 for β = 1.
    """
    x = make_inputs(1, 96, 1, 8, 4, gamma=False, dtype=torch.float32)
    with torch.no_grad():
        x["k"].copy_(x["k"][:, :1].expand_as(x["k"]).clone())
        x["initial_precond"].fill_(1.0)
        x["beta"].fill_(beta)
    assert_all_close(everything(x, "chunkwise"), everything(x, "reference"), tolerance)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"precond_min": 0.8, "precond_max": 1.2}, {"eta": 0.0}])
def test_the_size_of_a_group_changes_nothing(monkeypatch, options, packed):
    sequences = 4 if packed else 2
    x = make_inputs(1 if packed else 2, 300, 2, 6, 5, sequences=sequences)
    options = options | ({"cu_seqlens": torch.tensor([0, 7, 180, 181, 300])} if packed else {})
    whole = everything(x, "chunkwise", **options)
    for floats in (1, 2000, 10000):
        monkeypatch.setitem(chunkwise.GROUP_FLOATS, "cpu", floats)
        assert_all_close(everything(x, "chunkwise", **options), whole, 1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_handed_out_is_an_inference_tensor(packed):
    """Inside it is inference mode; autograd refuses such tensors wherever they are used again."""
    cu_seqlens = torch.tensor([0, 33, 70]) if packed else None
    x = make_inputs(1 if packed else 2, 70, 2, 6, 5, sequences=2 if packed else None)
    results = everything(x, "chunkwise", cu_seqlens=cu_seqlens)
    assert not [name for name, y in results.items() if y.is_inference()]


def test_autocast_does_not_reach_inside():
    """Under autocast q, k and v are rounded at the front door; nothing after that is."""
    x = make_inputs(2, 70, 2, 16, 16, dtype=torch.float32)
    rounded = {n: y.bfloat16() if n in "qkv" else y for n, y in detached(x).items()}
    rounded = {n: y.requires_grad_() for n, y in rounded.items()}
    expected = everything(rounded, "chunkwise")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = everything(x, "chunkwise")
    for name, y in expected.items():
        assert torch.equal(got[name], y.to(got[name].dtype)), name


@pytest.fixture
def tf32_settings():
    """PyTorch's, as they were before: the older one sets both."""
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize(
    "name, on, off", [("allow_tf32", True, False), ("fp32_precision", "tf32", "ieee")]
)
def test_tf32_is_off_inside_and_as_before_after(tf32_settings, name, on, off):
    if not hasattr(tf32_settings, name):
        pytest.skip("PyTorch has this setting from 2.9 on")
    for value in (on, off):
        setattr(tf32_settings, name, value)
        with chunkwise._exactly(torch.device("cuda")):
            assert getattr(tf32_settings, name) == off
        assert getattr(tf32_settings, name) == value


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest storage that any operation inside returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for y in torch.utils._pytree.tree_leaves(result):
            if isinstance(y, torch.Tensor):
                size = y.untyped_storage().nbytes() // y.element_size()
                self.elements = max(self.elements, size)
        return result


@pytest.mark.parametrize("options", [{}, {"precond_min": 0.8, "precond_max": 1.2}])
def test_no_tensor_of_T_by_T_or_T_by_K_by_V(options):
    T, H, K, V = 2048, 1, 48, 40
    x = detached(make_inputs(1, T, H, K, V, dtype=torch.float32))
    operands = Operands(**x, log_alpha=None, cu_seqlens=None)
    rule = Options(1.0, True, options.get("precond_min"), options.get("precond_max"), 1.0)
    with LargestTensor() as largest:
        o, S, d, saved = chunkwise.forward(operands, rule, True)
        chunkwise.backward(o, S, d, operands, saved, rule)
    q_and_k, per_chunk_states = 2 * T * H * K, T // 32 * K * V
    assert T * H * max(K, V) <= largest.elements <= max(q_and_k, per_chunk_states)


def peak_bytes(T: int, **options) -> int:
    """The most memory that forward and backward held beyond their inputs, by PyTorch's profiler."""
    x = make_inputs(1, T, 2, 64, 64, dtype=torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        everything(x, "chunkwise", beta_aware=True, **options)
    changes = [
        (event.start_ns(), event.nbytes())
        for event in watched.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("options", [{}, {"precond_min": 0.8, "precond_max": 1.2}])
def test_peak_memory(options):
    """At most 8 times q, k, v and o together, and no more than proportional to T."""
    peaks = {T: peak_bytes(T, **options) for T in (2048, 4096)}
    for T, peak in peaks.items():
        together = 4 * T * 2 * 64 * 4
        assert together < peak <= 8 * together, peak / together
    assert peaks[4096] <= 2.05 * peaks[2048]


def test_step_matches_the_forward_of_one_token():
    x = detached(make_inputs(3, 1, 2, 6, 5))
    rule = Options(0.7, True, 0.9, 1.1, 0.4)
    S, d = x["initial_state"], x["initial_precond"]
    operands = Operands(**x, log_alpha=None, cu_seqlens=None)
    o, final_state, final_precond, saved = chunkwise.forward(operands, rule, False)
    assert saved == []
    state, precond = S.clone(), d.clone()
    one = [None if y is None else y[:, 0] for y in operands[:6]]
    got = chunkwise.step(Token(*one, state, precond, None, None), rule)
    for name, y, z in (
        ("o", got, o[:, 0]),
        ("S", state, final_state),
        ("d", precond, final_precond),
    ):
        assert_close(y, z, 1e-12, name)
