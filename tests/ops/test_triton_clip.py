"""The Triton kernels where a box clips: some heads and sequences, from some chunk on, or none.

The walks go in rounds of eight tokens and start at the chunk that clips first.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton cannot be installed here")

from osdn.ops.operands import Operands, Options
from osdn.ops.triton import forward
from osdn.ops.triton.chunks import cut
from osdn.ops.triton.precond_tokens import token_scan
from tests.numerics import assert_close, make_inputs
from tests.ops.running import detached
from tests.ops.running_triton import DEVICE, check, on_device, poisoned_memory  # noqa: F401

BOUNDS = {"precond_min": 0.9, "precond_max": 1.1}


def clipping(T: int, first: dict[int, int], H: int = 1, K: int = 20, **kinds) -> dict:
    """Inputs of which head h is clipped from token first[h] on, a little later at most.

    Unit keys leave d at 1, where it starts. Keys of other lengths move it, up and down, so that
    some features are clipped and others are not.
    """
    x = detached(make_inputs(1, T, H, K, 16, gamma=False, dtype=torch.float32, **kinds))
    for head, token in first.items():
        lengthen(x["k"][0, token:, head])
    return x | {"initial_precond": torch.ones_like(x["initial_precond"])}


def lengthen(k: torch.Tensor) -> None:
    """Give keys [T, K] lengths from 0.4 to 1.8."""
    g = torch.Generator().manual_seed(7)
    k *= 0.4 + 1.4 * torch.rand(len(k), 1, generator=g)


def first_chunks(x: dict, offsets: torch.Tensor | None = None, **options) -> list:
    """The number of the chunk that clips first, by sequence and head; the bound where none does."""
    rule = Options(1.0, options.get("beta_aware", False), *BOUNDS.values(), 0.25)
    tensors = {n: None if y is None else y.detach() for n, y in on_device(x).items()}
    saved = forward(Operands(**tensors, log_alpha=None, cu_seqlens=offsets), rule, True)[3]
    return saved[4].tolist()


@pytest.mark.parametrize("T", [1, 7, 8, 72, pytest.param(133, marks=pytest.mark.slow)])
def test_lengths_that_end_within_a_round_or_with_it(T):
    x = clipping(T, {0: 0})
    assert first_chunks(x) == [[0]]
    check(x, **BOUNDS)


def test_from_the_first_chunk_from_a_later_one_and_never():
    x = clipping(140, {0: 0, 1: 70}, H=3)
    assert first_chunks(x) == [[0, 1, 3]]
    check(x, **BOUNDS)


@pytest.mark.parametrize("K", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_head_sizes_that_fill_their_tiles(K):
    """Loads have no mask over the features there."""
    x = clipping(75, {1: 0}, H=2, K=K)
    never, clipped = first_chunks(x)[0]
    assert (never, clipped) == (2, 0)
    check(x, **BOUNDS)


@pytest.mark.parametrize("beta_aware", [False, True])
def test_retention_beside_it(beta_aware):
    """γ, which lets d sink to the lower bound, and gradients of it."""
    x = clipping(70, {0: 0})
    g = torch.Generator().manual_seed(1)
    x["log_gamma"] = -0.3 * torch.rand(1, 70, 1, generator=g)
    x["log_gamma"][:, 9], x["log_gamma"][:, 40] = -float("inf"), 0.0
    check(x, **BOUNDS, beta_aware=beta_aware)


def test_packed_sequences_of_which_some_clip():
    offsets = torch.tensor([0, 5, 75, 203], device=DEVICE)
    x = clipping(203, {}, H=2, sequences=3)
    lengthen(x["k"][0, :5, 0])
    lengthen(x["k"][0, 142:, 1])  # in the second chunk of the last
    bound = cut(1, 203, offsets).bound
    assert first_chunks(x, offsets) == [[0, bound], [bound] * 2, [bound, 4]]
    check(x, cu_seqlens=offsets, **BOUNDS)


def test_half_precision_and_several_chunks():
    x = clipping(90, {0: 64}, H=2)
    check(x | {name: x[name].half() for name in "qkv"}, beta_aware=True, **BOUNDS)


def test_a_start_on_the_bound_passes_its_gradient():
    """u on a bound is inside; without keys d stays there, and so does its gradient."""
    x = clipping(20, {})
    x["k"][:] = 0
    x["initial_precond"][:] = BOUNDS["precond_max"]
    check(x, **BOUNDS)


def test_a_walk_is_the_same_from_any_chunk():
    """x, d at chunk starts and at the end, from the first chunk on or from the second."""
    x = on_device(clipping(150, {0: 0}, H=2))
    k, beta, start = (x[n].detach() for n in ("k", "beta", "initial_precond"))
    chunks, rule = cut(1, 150, None), Options(1.0, True, *BOUNDS.values(), 0.25)
    found = []
    solution, starts = torch.full_like(beta, torch.nan), k.new_full((3, 2, 20), torch.nan)
    starts[0] = start[0]
    for first in (0, 1):
        clipped = torch.full((1, 2), first, dtype=torch.int32, device=DEVICE)
        end = torch.full_like(start, torch.nan)
        token_scan(k, beta, None, solution, starts, end, clipped, chunks, rule)
        found.append((solution.clone(), starts.clone(), end))
    for whole, part in zip(*found):
        assert whole.isfinite().all() and torch.equal(whole, part)
    # And x against its definition in float64, from d as it was left at the second chunk's start.
    d = found[0][1][1].double()
    for t in range(64, 80):
        s = k[0, t].double() ** 2
        want = 1 - beta[0, t].double() * (d * s).sum(-1)
        assert_close(found[0][0][0, t].double(), want, 1e-5, f"x at {t}")
        d = (d + (beta[0, t].double() * want)[:, None] * s).clamp(*BOUNDS.values())
