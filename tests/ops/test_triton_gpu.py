"""What only a GPU can show of the Triton backend: compiled kernels, graphs, sizes past 2^31."""

import pytest
import torch

from osdn.cli.selfcheck import FLOORS, check_all
from osdn.ops import online_scaled_delta_rule, online_scaled_delta_step
from osdn.ops.triton.chunks import count_segments
from tests.numerics import assert_close, make_inputs, relative_error
from tests.ops.running import BOX

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def inputs_on_gpu(*sizes: int, dtype: torch.dtype = torch.bfloat16, **options) -> dict:
    inputs = make_inputs(*sizes, dtype=dtype, **options)
    return {n: None if x is None else x.detach().cuda().requires_grad_() for n, x in inputs.items()}


def test_every_case_of_selfcheck():
    wrong = [result for result in check_all() if not result.right]
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"beta_aware": True, "precond_min": 0.0}])
def test_long_sequences_walk_in_segments(dtype, options, monkeypatch):
    """Against the plain backend in float64: twice its own error and selfcheck's floor."""
    monkeypatch.setattr("osdn.ops.triton.chunks.LONG", 16)
    assert count_segments(1, 5000, 2, ease=2) > 1
    options = options | ({"precond_max": 1.4} if options else {})
    inputs = inputs_on_gpu(1, 5000, 2, 128, 128, dtype=dtype)
    exact = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    expected = _everything(exact, "chunkwise", options)
    plain, actual = (_everything(inputs, name, options) for name in ("chunkwise", "triton"))
    for name, x in expected.items():
        limit = 2 * relative_error(plain[name], x) + FLOORS[dtype]
        assert_close(actual[name], x, limit, name)


def _everything(inputs: dict, backend: str, options: dict) -> dict:
    """Results and gradients of a random linear function of them, by name."""
    results = online_scaled_delta_rule(
        **inputs, output_final_state=True, backend=backend, **options
    )
    g = torch.Generator("cuda").manual_seed(5)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=g, device="cuda")).sum() for x in results
    )
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    return dict(zip("oSd", results)) | {f"d{n}": x for n, x in zip(inputs, gradients)}


def test_full_graph_compile_is_eager():
    inputs = inputs_on_gpu(2, 130, 2, 64, 64)

    def loss(**tensors):
        o, S, d = online_scaled_delta_rule(**tensors, output_final_state=True, beta_aware=True)
        return o.float().square().mean() + S.square().mean() + d.square().mean()

    eager = torch.autograd.grad(loss(**inputs), list(inputs.values()))
    compiled = torch.compile(loss, fullgraph=True)
    for name, a, b in zip(
        inputs, torch.autograd.grad(compiled(**inputs), list(inputs.values())), eager
    ):
        assert_close(a, b, 1e-3, name)


@pytest.mark.parametrize("options", [{"beta_aware": True}, BOX])
def test_decode_step_compiles_and_is_captured(options):
    inputs = {n: x.detach() for n, x in inputs_on_gpu(4, 5, 2, 128, 64).items()}
    tokens = {n: inputs[n] for n in ("q", "k", "v", "beta", "log_gamma")}
    whole, S, d = online_scaled_delta_rule(**inputs, output_final_state=True, **options)

    def step(state, precond, **token):
        return online_scaled_delta_step(**token, state=state, precond=precond, **options)[0]

    compiled = torch.compile(step, fullgraph=True)
    with torch.no_grad():
        for how in ("eager", "compiled", "captured"):
            state, precond = inputs["initial_state"].clone(), inputs["initial_precond"].clone()
            token = {n: x[:, 0].clone() for n, x in tokens.items()}
            if how == "captured":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    captured = step(state, precond, **token)
            for t in range(5):
                for n, x in tokens.items():
                    token[n].copy_(x[:, t])
                if how == "captured":
                    graph.replay()
                    o = captured
                else:
                    o = (step if how == "eager" else compiled)(state, precond, **token)
                assert_close(o, whole[:, t], 2e-2, f"{how} o at {t}")
            assert_close(state, S, 1e-2, how)
            assert_close(precond, d, 1e-5, how)


def test_no_kernel_is_compiled_again_for_another_length_or_batch():
    from osdn.ops.triton.memory_backward import memory_reverse_kernel
    from osdn.ops.triton.memory_forward import memory_kernel
    from osdn.ops.triton.memory_gradients import gradients_kernel
    from osdn.ops.triton.precond_forward import inverse_kernel, scan_kernel
    from osdn.ops.triton.write_keys import write_keys_kernel

    kernels = (
        inverse_kernel,
        scan_kernel,
        write_keys_kernel,
        memory_kernel,
        memory_reverse_kernel,
        gradients_kernel,
    )

    def compiled() -> list[int]:
        return [sum(len(c[0]) for c in kernel.device_caches.values()) for kernel in kernels]

    def both(B, T):
        inputs = inputs_on_gpu(B, T, 2, 64, 64)
        o = online_scaled_delta_rule(**inputs)[0]
        torch.autograd.grad(o.sum(), list(inputs.values()), materialize_grads=True)

    both(2, 128)
    both(1, 32768)  # few and long sequences also have kernels that join segments
    before = compiled()
    assert min(before) > 0
    for B, T in ((1, 1), (3, 63), (1, 40000), (16, 100), (2, 1000), (2, 8000)):
        both(B, T)
    assert compiled() == before


def test_more_than_2_to_the_31_elements():
    T, H, K = 2**20 + 4160, 16, 128
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda", dtype=torch.bfloat16)

    k = normal(1, T, H, K)
    k /= k.norm(dim=-1, keepdim=True)
    inputs = {"q": normal(1, T, H, K), "k": k, "v": normal(1, T, H, K)}
    inputs["beta"] = torch.rand(1, T, H, generator=g, device="cuda")
    with torch.no_grad():
        o, S, d = online_scaled_delta_rule(**inputs, output_final_state=True)
        tail = o[:, -4096:].clone()
        del o
        head = {n: x[:, :-4096] for n, x in inputs.items()}
        _, S0, d0 = online_scaled_delta_rule(**head, output_final_state=True)
        rest = {n: x[:, -4096:] for n, x in inputs.items()}
        o1, S1, d1 = online_scaled_delta_rule(
            **rest, initial_state=S0, initial_precond=d0, output_final_state=True
        )
    assert_close(tail, o1, 2e-2)  # the dots' operands are bfloat16, and segments begin elsewhere
    assert_close(S, S1, 2e-2)
    assert_close(d, d1, 1e-5)
