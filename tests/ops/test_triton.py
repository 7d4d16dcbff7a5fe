"""The Triton kernels against the float64 definition: in Triton's interpreter, or on a GPU.

The interpreter (tests/conftest.py turns it on where there is no GPU) runs the same kernel code on
CPU tensors at small sizes, which checks their logic but not their compilation: test_triton_gpu.py
and `osdn selfcheck` do that. Memory that torch.empty hands out is filled with NaN here, so that
nothing unwritten can pass.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton cannot be installed here")

from osdn.ops import online_scaled_delta_rule, online_scaled_delta_step
from osdn.ops.interface import BACKENDS
from osdn.ops.operands import Operands, Options, Token
from osdn.ops.triton import forward as backend_forward
from osdn.ops.triton import step as backend_step
from osdn.ops.triton.chunks import CHUNK, count_segments, cut
from osdn.ops.triton.precond_segments import join
from tests.numerics import assert_close, make_inputs, relative_error
from tests.ops.running import detached, everything
from tests.ops.running_triton import DEVICE, check, on_device, poisoned_memory  # noqa: F401

BOX = {"precond_min": 0.9, "precond_max": 1.05}


@pytest.mark.parametrize("T, K, V", [(1, 16, 16), (17, 20, 36), (63, 64, 16), (65, 72, 20)])
def test_lengths_and_head_sizes(T, K, V):
    check(make_inputs(1, T, 1, K, V, dtype=torch.float32))


def test_several_sequences_heads_and_blocks_of_v():
    check(make_inputs(2, 20, 2, 16, 70, dtype=torch.float32), beta_aware=True)


def test_three_chunks_beta_aware():
    check(make_inputs(1, 130, 1, 24, 16, dtype=torch.float32), beta_aware=True, eta=0.7)


def test_no_retention_and_long_keys():
    inputs = make_inputs(1, 70, 1, 20, 20, gamma=False, unit_keys=False, dtype=torch.float32)
    check(inputs, scale=0.3)


def test_constant_preconditioner():
    check(make_inputs(1, 70, 1, 20, 20, gamma=False, dtype=torch.float32), eta=0.0)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"beta_aware": True, "eta": 1.5}, marks=pytest.mark.slow)]
)
def test_active_clip(options):
    check(make_inputs(1, 67, 2, 20, 16, dtype=torch.float32), **BOX, **options)


def test_clip_that_never_acts_is_no_clip():
    inputs = on_device(make_inputs(1, 66, 1, 20, 16, dtype=torch.float32))
    free = everything(inputs, "triton")
    boxed = everything(inputs, "triton", precond_min=-100.0, precond_max=100.0)
    for name, x in free.items():
        assert_close(boxed[name], x, 5e-6, name)


@pytest.mark.slow
def test_box_is_left_late_or_by_some_heads_only():
    """Chunks before the first clip are made in parallel, those from there on token by token."""
    inputs = make_inputs(2, 140, 2, 20, 16, gamma=False, dtype=torch.float32)
    precond = torch.ones(2, 2, 20)
    k = inputs["k"].detach()
    k[0, 70:, 0] *= 1.3  # unit keys leave d at 1; these do not
    inputs |= {"initial_precond": precond, "k": k}
    bounds = {"precond_min": 0.93, "precond_max": 1.07}
    check(inputs, **bounds)
    saved = _saved(on_device(inputs), bounds)
    assert saved.tolist() == [[1, 6], [6, 6]]
    check(inputs, beta_aware=True, **bounds)


def _saved(inputs: dict, bounds: dict) -> torch.Tensor:
    """The number of the first chunk that was clipped, [N, H]; the bound where none was."""
    rule = Options(1.0, False, *bounds.values(), 0.25)
    tensors = {n: None if x is None else x.detach() for n, x in inputs.items()}
    operands = Operands(**tensors, log_alpha=None, cu_seqlens=None)
    return backend_forward(operands, rule, True)[3][4]


def test_when_walks_are_cut_into_segments():
    assert count_segments(1, 65536, 32) == 8  # of 128 chunks each: 256 programs
    assert count_segments(1, 16384, 16) == 16  # of 16 chunks, the least
    assert count_segments(1, 16384, 8, ease=2) == 1  # a shorter walk, not worth it
    assert count_segments(1, 8192, 32) == 1
    assert count_segments(2, 65536, 64) == 1  # enough programs as it is


@pytest.mark.parametrize(
    "T, V, options", [(300, 20, {}), pytest.param(257, 70, BOX, marks=pytest.mark.slow)]
)
def test_walks_in_segments(monkeypatch, T, V, options):
    monkeypatch.setattr("osdn.ops.triton.chunks.SPAN", 1)
    monkeypatch.setattr("osdn.ops.triton.chunks.LEAST", 1)
    monkeypatch.setattr("osdn.ops.triton.chunks.LONG", 2)
    assert count_segments(1, T, 2) == count_segments(1, T, 1, ease=2) == 5
    check(make_inputs(1, T, 1, 24, V, dtype=torch.float32), **options)


@pytest.mark.slow
def test_segments_and_a_box_that_is_left_late(monkeypatch):
    monkeypatch.setattr("osdn.ops.triton.chunks.SPAN", 1)
    monkeypatch.setattr("osdn.ops.triton.chunks.LEAST", 1)
    monkeypatch.setattr("osdn.ops.triton.chunks.LONG", 2)
    inputs = make_inputs(1, 300, 1, 20, 16, gamma=False, dtype=torch.float32)
    k = inputs["k"].detach()
    k[:, 150:] *= 1.3
    inputs |= {"initial_precond": torch.ones(1, 1, 20), "k": k}
    bounds = {"precond_min": 0.93, "precond_max": 1.07}
    check(inputs, **bounds)
    assert _saved(on_device(inputs), bounds).tolist() == [[2]]


@pytest.mark.slow
def test_segments_of_several_sequences_and_heads(monkeypatch):
    monkeypatch.setattr("osdn.ops.triton.chunks.SPAN", 2)
    monkeypatch.setattr("osdn.ops.triton.chunks.LEAST", 2)
    monkeypatch.setattr("osdn.ops.triton.chunks.LONG", 3)
    assert count_segments(2, 390, 2, ease=2) == 4  # of two chunks each, the last of one
    check(make_inputs(2, 390, 2, 16, 16, dtype=torch.float32), beta_aware=True)


@pytest.mark.parametrize("reverse", [False, True])
def test_joining_segments_needs_no_exact_maps(reverse):
    """Against the chain of maps itself, with maps given that are off by 1e-2."""
    g = torch.Generator().manual_seed(0)
    (N, NS, H, K), order = (2, 5, 2, 20), -1 if reverse else 1
    M = torch.eye(K) - 0.3 * torch.rand(N * NS, H, K, K, generator=g) / K
    u, initial = (torch.randn(n, H, K, generator=g) for n in (N * NS, N))
    rough = M + 1e-2 * torch.randn(M.shape, generator=g) / K**0.5

    def walk(starts, _):
        return torch.einsum("nhji,nhj->nhi" if reverse else "nhij,nhj->nhi", M, starts) + u

    expected = initial
    for i in range(NS)[::order]:
        expected = walk(expected.repeat_interleave(NS, 0), None).view(N, NS, H, K)[:, i]
    on_device = (x.to(DEVICE) for x in (rough, initial))
    u, M = u.to(DEVICE), M.to(DEVICE)
    error = relative_error(
        join(walk, *on_device, cut(N, 64 * NS, None), reverse=reverse).cpu(), expected
    )
    assert error < 1e-5


@pytest.mark.parametrize("options", [{}, BOX])
def test_packed_sequences(options):
    offsets = torch.tensor([0, 1, 66, 80], device=DEVICE)
    inputs = make_inputs(1, 80, 1, 20, 16, sequences=3, dtype=torch.float32)
    check(inputs, cu_seqlens=offsets, **options)


@pytest.mark.parametrize("options", [{"beta_aware": True}, BOX])
def test_half_precision(options):
    check(make_inputs(1, 66, 1, 40, 24, dtype=torch.float16), **options)


def test_spans_of_packed_sequences(monkeypatch):
    """The backward starts at every second chunk of each sequence from what the forward kept."""
    monkeypatch.setattr("osdn.ops.triton.chunks.SPAN", 2)
    offsets = torch.tensor([0, 140, 141, 280], device=DEVICE)
    chunks = cut(1, 280, offsets)
    assert chunks.spans.offsets.tolist() == [0, 2, 3]
    used = [pair for pair in chunks.spans.indices.tolist() if pair[0] >= 0]
    assert used == [[0, 0], [0, 1], [1, 0], [2, 0], [2, 1]]
    inputs = make_inputs(1, 280, 1, 16, 20, sequences=3, dtype=torch.float32)
    check(inputs, cu_seqlens=offsets)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_the_backward_divides_by(scale):
    check(make_inputs(1, 20, 1, 16, 16, dtype=torch.float32), scale=scale)


def test_duplicate_keys_and_strong_writes():
    inputs = make_inputs(1, 70, 1, 16, 16, dtype=torch.float32)
    k = inputs["k"].detach()
    k[:, 1:40] = k[:, :1]
    inputs["k"] = k
    inputs["beta"] = 1.0 + torch.arange(70).view(1, 70, 1) % 2
    check(inputs, beta_aware=True)


def test_padding_changes_nothing():
    inputs = detached(make_inputs(1, 70, 1, 16, 16, dtype=torch.float32))
    for name in ("k", "beta", "log_gamma"):
        inputs[name][:, 50:] = 0
    whole = online_scaled_delta_rule(
        **on_device(inputs), output_final_state=True, backend="triton", **BOX
    )
    short = {n: x if n.startswith("initial") else x[:, :50] for n, x in inputs.items()}
    part = online_scaled_delta_rule(
        **on_device(short), output_final_state=True, backend="triton", **BOX
    )
    assert torch.equal(whole[1], part[1])
    assert torch.equal(whole[2], part[2])


def test_strided_inputs_and_expanded_gradient():
    inputs = on_device(make_inputs(1, 20, 2, 16, 16, dtype=torch.float32))
    strided = {
        n: x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x
        for n, x in inputs.items()
    }
    given = list(inputs.values())
    o, o_strided = (online_scaled_delta_rule(**x, backend="triton")[0] for x in (inputs, strided))
    assert torch.equal(o, o_strided)
    ones = torch.ones_like(o)
    for a, b in zip(
        torch.autograd.grad(o, given, ones, materialize_grads=True),
        torch.autograd.grad(o_strided.sum(), given, materialize_grads=True),
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"beta_aware": True}, BOX])
def test_step(options):
    inputs = make_inputs(2, 1, 2, 20, 70, gamma=not options, dtype=torch.float32)
    inputs = detached(on_device(inputs))
    token = {n: x[:, 0] for n, x in inputs.items() if x is not None and x.shape[1] == 1}
    results = []
    for backend in ("triton", "reference"):
        state, precond = inputs["initial_state"].clone(), inputs["initial_precond"].clone()
        o, *after = online_scaled_delta_step(
            **token, state=state, precond=precond, backend=backend, **options
        )
        assert after[0] is state and after[1] is precond
        results.append((o, state, precond))
    for actual, expected in zip(*results):
        assert_close(actual, expected, 1e-6)


def test_step_with_slots_of_a_pool():
    inputs = detached(on_device(make_inputs(3, 1, 2, 16, 24, dtype=torch.float32)))
    token = [inputs[n][:, 0] for n in ("q", "k", "v", "beta", "log_gamma")]
    rule = Options(1.0, True, None, None, 0.25)  # the default scale of K = 16
    g = torch.Generator().manual_seed(3)
    pool = torch.randn(5, 2, 16, 24, generator=g).to(DEVICE)
    preconds = torch.rand(5, 2, 16, generator=g).to(DEVICE)
    slots = torch.tensor([4, -1, 0], device=DEVICE)
    state, precond = pool.clone(), preconds.clone()
    o, *_ = online_scaled_delta_step(
        *token, state=state, precond=precond, slots=slots, beta_aware=True, backend="triton"
    )
    for i, slot in ((0, 4), (2, 0)):
        S, d = pool[slot : slot + 1].clone(), preconds[slot : slot + 1].clone()
        q, k, v, beta, log_gamma = (x[i : i + 1].contiguous() for x in token)
        alone = backend_step(Token(q, k, v, beta, log_gamma, None, S, d, None, None), rule)
        assert torch.equal(alone[0], o[i])
        assert torch.equal(S[0], state[slot]) and torch.equal(d[0], precond[slot])
    for slot in (1, 2, 3):
        assert torch.equal(state[slot], pool[slot]) and torch.equal(precond[slot], preconds[slot])


def test_chunks_of_packed_sequences():
    offsets = torch.tensor([0, 1, 1 + CHUNK, 2 + 2 * CHUNK], device=DEVICE)
    chunks = cut(1, int(offsets[-1]), offsets)
    assert chunks.offsets.tolist() == [0, 1, 2]
    used = [pair for pair in chunks.indices.tolist() if pair[0] >= 0]
    assert used == [[0, 0], [1, 0], [2, 0], [2, 1]]
    assert cut(1, int(offsets[-1]), offsets) is chunks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "box, offsets",
    [((None, None), None), pytest.param((0.7, 0.8), [0, 1, 17], marks=pytest.mark.slow)],
    ids=["free", "box, packed"],
)
def test_custom_operator_contract(box, offsets):
    """`saved_like` among it: what is kept for a decay, and with a box."""
    inputs = make_inputs(1, 17, 1, 16, 16, alpha=True, sequences=offsets and 2, dtype=torch.float32)
    x = on_device(inputs)
    tensors = [x[name] for name in Operands._fields[:-1]]
    cu_seqlens = None if offsets is None else torch.tensor(offsets, device=DEVICE)
    rule = (1.0, True, *box, 0.25)
    torch.library.opcheck(BACKENDS["triton"].rule, (*tensors, cu_seqlens, *rule, True))


@pytest.mark.filterwarnings("ignore")
def test_custom_operator_contract_of_a_step():
    x = on_device(make_inputs(1, 1, 1, 16, 16, alpha=True, dtype=torch.float32))
    tensors = [x[name].detach() for name in Operands._fields[:-1]]
    token = [x[:, 0].contiguous() for x in tensors[:6]]
    for slots in (None, torch.zeros(1, dtype=torch.int64, device=DEVICE)):
        arguments = (*token, *tensors[6:], slots, slots, 1.0, True, None, None, 0.25)
        torch.library.opcheck(BACKENDS["triton"].step, arguments)


def test_what_the_front_door_refuses(monkeypatch):
    inputs = make_inputs(1, 2, 1, 16, 16, dtype=torch.float32)
    cases = [
        ({n: x.double() for n, x in inputs.items()}, "bfloat16, float16 or float32"),
        (make_inputs(1, 2, 1, 300, 16, dtype=torch.float32), "at most 256"),
    ]
    if DEVICE == "cpu":
        half = {n: x.bfloat16() if x.ndim == 4 else x for n, x in inputs.items()}
        cases.append((half | {"initial_state": inputs["initial_state"]}, "multiplies the bits"))
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            online_scaled_delta_rule(**on_device(wrong), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors, got tensors on cpu"):
        online_scaled_delta_rule(**inputs, backend="triton")
