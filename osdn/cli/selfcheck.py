"""Compare the Triton kernels on this machine's GPU with the float64 definition.

A GPU compiler can be wrong without saying so. Every case runs forward, backward and decoding on the
kernels as this machine compiles them, and measures each result and gradient by

    ‖actual − expected‖ / ‖expected‖,

expected being osdn.ops.reference in float64 on the same inputs. The limit is twice the error of the
plain PyTorch backend (chunkwise, float32 inside) in the same dtype, plus a floor for what kernels
round besides: the operands of their matrix products are in the inputs' dtype. The short convolution
is compared likewise.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from math import inf
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from osdn.errors import UserError
from osdn.ops import convolution, online_scaled_delta_rule, online_scaled_delta_step
from osdn.ops.numerics import relative_error
from osdn.system.processes import end_with_parent

# About 40 units in the last place of float32, and 1.5 of the 16-bit ones.
FLOORS = {torch.float32: 5e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Case(NamedTuple):
    """One comparison: sizes, options, what is odd about the inputs, a factor on the floor, whether
    walks are cut into segments at this length, which is otherwise done from 16,384 on, and whether
    the memory decays.
    """

    name: str
    B: int
    T: int
    H: int
    K: int
    V: int
    options: dict
    gamma: bool = True
    cu_seqlens: tuple[int, ...] | None = None
    odd: str = ""
    slack: float = 1.0
    cut: bool = False
    alpha: bool = False


# Tight enough that d leaves them, which the kernels then repair.
BOX = {"precond_min": 0.9, "precond_max": 1.05}
LATE = {"precond_min": 0.93, "precond_max": 1.07}
# Every path of the kernels: borders of chunks, sizes that are no power of two, both rules, packs.
CASES = [
    Case("one token", 2, 1, 2, 64, 64, {}),
    Case("T 63", 2, 63, 2, 64, 64, {"beta_aware": True}),
    Case("T 65", 1, 65, 3, 128, 128, {}, gamma=False),
    Case("T 1000", 2, 1000, 2, 128, 128, {"beta_aware": True}),
    Case("K < V, odd", 1, 200, 2, 40, 100, {}),
    Case("K > V, odd", 2, 130, 1, 96, 24, {"eta": 0.5, "beta_aware": True}),
    Case("K, V 256", 1, 200, 2, 256, 256, {}),
    Case("delta rule", 2, 300, 2, 128, 128, {"eta": 0.0}, gamma=False),
    Case("box", 2, 300, 2, 128, 128, BOX),
    Case("box, beta-aware", 1, 257, 2, 64, 128, BOX | {"beta_aware": True}),
    Case("box, left late", 1, 320, 2, 64, 64, LATE, gamma=False, odd="late"),
    Case("in segments", 1, 4160, 1, 64, 64, {"beta_aware": True}, cut=True),
    Case("in segments, box", 1, 2100, 1, 128, 64, LATE, gamma=False, odd="late", cut=True),
    Case("packed", 1, 400, 2, 64, 64, {}, cu_seqlens=(0, 1, 64, 129, 400)),
    Case("packed, box", 1, 200, 2, 128, 64, BOX, cu_seqlens=(0, 3, 131, 200)),
    # Here every later token erases what an earlier one wrote, so that d log γ and dβ are what is
    # left of large terms that cancel, and rounding e, S and their gradients to 16 bits shows more.
    Case("one key again and again", 1, 192, 2, 64, 64, {}, odd="repeated", slack=3.0),
    Case("beta 1 and 2", 1, 192, 2, 64, 64, {"beta_aware": True}, odd="strong"),
    Case("empty tokens, d at the box", 1, 192, 2, 64, 64, BOX, odd="empty"),
    Case("decay", 2, 300, 2, 128, 128, {"beta_aware": True}, alpha=True),
    Case("decay, K, V 256", 1, 200, 2, 256, 256, {}, alpha=True),
    Case("decay, delta rule", 1, 1000, 2, 40, 100, {"eta": 0.0}, gamma=False, alpha=True),
    Case("decay, hard resets", 1, 700, 2, 64, 128, {}, odd="resets", alpha=True),
    Case("decay, in segments", 1, 4160, 1, 64, 64, {}, cut=True, alpha=True),
    Case("decay, packed", 1, 400, 2, 64, 64, {}, cu_seqlens=(0, 1, 64, 129, 400), alpha=True),
    Case("decay, box", 1, 257, 2, 64, 128, BOX | {"beta_aware": True}, alpha=True),
]


class Convolution(NamedTuple):
    """One comparison of the short convolution."""

    name: str
    B: int
    T: int
    D: int
    W: int
    head_dim: int | None = None
    cu_seqlens: tuple[int, ...] | None = None


CONVOLUTIONS = [
    Convolution("convolution, norm", 2, 1000, 512, 4, 128),
    Convolution("convolution, K 40", 2, 130, 120, 4, 40),
    Convolution("convolution, no norm", 1, 700, 200, 4),
    Convolution("convolution, packed", 1, 400, 128, 3, 64, (0, 1, 3, 129, 400)),
]
TINY = [  # what Triton's interpreter does in a minute
    Case("T 17", 1, 17, 1, 16, 16, {"beta_aware": True}),
    Case("packed", 1, 66, 1, 24, 16, {}, cu_seqlens=(0, 1, 66)),
    Case("box", 1, 17, 1, 16, 24, BOX),
    Case("decay", 1, 66, 1, 16, 24, {}, odd="resets", alpha=True),
]


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | None]:
    """Random arguments of the operator by name; q, k, v in dtype, the rest float32."""
    # On the CPU: the same numbers on every GPU.
    g = torch.Generator().manual_seed(case.T + case.K)
    B, T, H, K, V = case.B, case.T, case.H, case.K, case.V
    N = B if case.cu_seqlens is None else len(case.cu_seqlens) - 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    k = normalize(normal(B, T, H, K), dim=-1)
    beta = normal(B, T, H).sigmoid()
    d = 1 + 0.3 * normal(N, H, K)  # away from 1, where unit keys would leave it
    log_gamma = logsigmoid(normal(B, T, H) + 4)
    if case.odd == "repeated":
        k = k[:, :1].expand(B, T, H, K)
    if case.odd == "late":  # unit keys leave d at 1; these leave the box, and in one head only
        k[:, T // 2 :, 0] *= 1.3
        d = torch.ones_like(d)
    if case.odd == "strong":
        # 1 and 2 in turn: the largest erase there is
        beta = 1.0 + torch.arange(T).view(1, T, 1).expand(B, T, H) % 2
        d = d.clamp(0.3, 0.9)
    if case.odd == "empty":
        empty = torch.arange(T).view(1, T, 1) % 3 == 0  # every third token is padding
        k = k.masked_fill(empty[..., None], 0.0)
        beta, log_gamma = beta.masked_fill(empty, 0.0), log_gamma.masked_fill(empty, 0.0)
        d = d.clamp(case.options["precond_min"], case.options["precond_max"])
    log_alpha = logsigmoid(normal(B, T, H) + 3)
    if case.odd == "resets":  # in one head, within chunks and where they begin
        log_alpha[:, 20::44, 0], log_alpha[:, 31::97, 0] = -1e4, -inf
    inputs = {
        "q": normalize(normal(B, T, H, K), dim=-1).to(dtype),
        "k": k.to(dtype),
        "v": normal(B, T, H, V).to(dtype),
        "beta": beta,
        "log_gamma": log_gamma if case.gamma else None,
        "log_alpha": log_alpha if case.alpha else None,
        "initial_state": 0.3 * normal(N, H, K, V),
        "initial_precond": d,
    }
    return {name: None if x is None else x.to(device) for name, x in inputs.items()}


def everything(
    case: Case, inputs: dict[str, Tensor | None], backend: str, cu_seqlens: Tensor | None
) -> dict[str, Tensor]:
    """Results, gradients of one random linear function of them, and one decoded token."""
    # Everything is differentiated, the initial states too.
    leaves = {n: None if x is None else x.detach().requires_grad_() for n, x in inputs.items()}
    given: dict[str, Any] = {n: x for n, x in leaves.items() if x is not None}
    options: dict[str, Any] = case.options | {"backend": backend}
    results = online_scaled_delta_rule(
        **given, output_final_state=True, cu_seqlens=cu_seqlens, **options
    )
    g = torch.Generator().manual_seed(1)
    # A random weight for each number: an error in any place reaches the gradients.
    loss = torch.zeros((), dtype=torch.float64, device=given["q"].device)
    for x in results:
        assert x is not None
        weight = torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.device)
        loss = loss + (x.double() * weight).sum()
    gradients = torch.autograd.grad(loss, list(given.values()))
    named = dict(zip(("o", "S", "d"), results)) | {f"d{n}": x for n, x in zip(given, gradients)}

    # The last token once more, as decoding would take it, from the initial states.
    N = given["initial_state"].shape[0]
    names = ("q", "k", "v", "beta", "log_gamma", "log_alpha")
    tokens = {n: given[n].detach()[:, -1] for n in names if n in given}
    tokens = {n: x.expand(N, *x.shape[1:]) for n, x in tokens.items()}
    state, precond = (given[f"initial_{n}"].detach().clone() for n in ("state", "precond"))
    step = online_scaled_delta_step(**tokens, state=state, precond=precond, **options)
    return named | dict(zip(("step o", "step S", "step d"), step))  # type: ignore[return-value]


class Result(NamedTuple):
    """Of one case and dtype, the quantity that came closest to its limit (or passed it)."""

    case: str
    dtype: str
    quantity: str
    error: float
    limit: float

    @property
    def right(self) -> bool:
        return self.error <= self.limit  # not so where the error is NaN


def check(case: Case, dtype_name: str, device: torch.device) -> Result:
    """Run one case on the kernels, the plain backend and the reference."""
    dtype = DTYPES[dtype_name]
    cu = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens, device=device)
    inputs = make_inputs(case, dtype, device)
    exact = {n: None if x is None else x.double() for n, x in inputs.items()}
    expected = everything(case, exact, "reference", cu)
    plain = everything(case, inputs, "chunkwise", cu)
    from osdn.ops.triton import chunks

    def kernels() -> dict[str, Tensor]:
        with patch.object(chunks, "LONG", 16 if case.cut else chunks.LONG):
            return everything(case, inputs, "triton", cu)

    return _nearest(case.name, dtype_name, expected, plain, kernels, case.slack)


def check_convolution(case: Convolution, dtype_name: str, device: torch.device) -> Result:
    """Run one case of the short convolution by PyTorch in float64, in dtype, and by the kernels."""
    g = torch.Generator().manual_seed(case.T)
    cu = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens, device=device)
    dy, x = torch.randn(2, case.B, case.T, case.D, generator=g).to(device, DTYPES[dtype_name])
    weight = torch.randn(case.D, case.W, generator=g).to(device)

    def run(module: Any, *given: Tensor) -> dict[str, Tensor]:
        dx, dweight = module.backward(*given, cu, case.head_dim)
        return {"y": module.forward(*given[1:], cu, case.head_dim), "dx": dx, "dweight": dweight}

    from osdn.ops.triton import convolution as kernels

    exact = run(convolution, dy.double(), x.double(), weight.double())
    plain = run(convolution, dy, x, weight)
    return _nearest(case.name, dtype_name, exact, plain, lambda: run(kernels, dy, x, weight), 1.0)


def _nearest(
    case: str,
    dtype: str,
    expected: dict[str, Tensor],
    plain: dict[str, Tensor],
    kernels: Callable[[], dict[str, Tensor]],
    slack: float,
) -> Result:
    """Of all that the kernels make, what is nearest to its limit."""
    try:
        actual = kernels()
    except Exception as problem:  # one kernel that does not compile must not hide the other cases
        return Result(case, dtype, f"{type(problem).__name__}: {problem}"[:200], inf, 0.0)
    floor = slack * FLOORS[DTYPES[dtype]]
    results = []
    for name, x in expected.items():
        # Relative to what plain PyTorch gets in this dtype: the dtype's own error is no fault.
        limit = 2 * relative_error(plain[name], x) + floor
        results.append(Result(case, dtype, name, relative_error(actual[name], x), limit))
    # A wrong one first, whatever the others' ratios are.
    return max(results, key=lambda r: (not r.right, r.error / r.limit))


def check_all() -> Iterator[Result]:
    """Every case in every dtype; small float32 ones in Triton's interpreter without a GPU.

    Nearly all the time goes into compiling, which takes one core: so the cases share the cores.
    """
    if find_spec("triton") is None:
        raise UserError(
            "the kernels need triton, which is not installed; pip install triton (on Linux)"
        )
    if torch.cuda.is_available():
        device = torch.device("cuda")
        # Spawned: a forked process cannot use CUDA.
        workers = min(os.cpu_count() or 1, 16)
        with ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent) as pool:
            under_way = [pool.submit(check, case, n, device) for n in DTYPES for case in CASES]
            pairs = [(one, name) for name in DTYPES for one in CONVOLUTIONS]
            under_way += [pool.submit(check_convolution, *pair, device) for pair in pairs]
            yield from (one.result() for one in under_way)
    elif os.environ.get("TRITON_INTERPRET", "0") == "1":
        yield from (check(case, "float32", torch.device("cpu")) for case in TINY)
        yield check_convolution(CONVOLUTIONS[-1], "float32", torch.device("cpu"))
    else:
        raise UserError(
            "no CUDA device found, and these kernels run on one; TRITON_INTERPRET=1 checks their "
            "logic at tiny sizes on the CPU"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: there is one way to check."""


def run(args: argparse.Namespace) -> None:
    """Print a line for every case; fail if any is past its limit."""
    wrong, count = 0, 0
    for result in check_all():
        if not count:
            print(
                f"{'case':28s} {'dtype':9s} {'nearest its limit':18s} {'error':>8s} {'limit':>8s}"
            )
        count += 1
        wrong += not result.right
        print(
            f"{result.case:28s} {result.dtype:9s} {result.quantity:18s} {result.error:8.1e} "
            f"{result.limit:8.1e}  {'ok' if result.right else 'WRONG'}",
            flush=True,
        )
    if wrong:
        import triton

        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the interpreter"
        raise UserError(
            f"{wrong} of {count} cases are wrong with Triton {triton.__version__} and torch "
            f"{torch.__version__} on {where}: do not use backend 'triton' here ('chunkwise' is "
            "slower and right), try another Triton, and report this table"
        )
    print(f"all {count} cases within their limits")
