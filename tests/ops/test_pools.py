"""The step on pools of memories: places of any stride, read in one and written to another."""

from importlib.util import find_spec

import pytest
import torch

from osdn.ops import online_scaled_delta_step
from tests.numerics import make_inputs
from tests.ops.running import BOX, detached

GPU = torch.cuda.is_available()
DEVICES = {
    "reference": "cpu",
    "chunkwise": "cpu",
    "numba": "cpu",
    "triton": "cuda" if GPU else "cpu",
}
NAMES = ("q", "k", "v", "beta", "log_gamma", "log_alpha")
B, P = 4, 9


@pytest.fixture(params=DEVICES)
def every_backend(request) -> str:
    """All four; Triton in its interpreter where there is no GPU."""
    if request.param in ("numba", "triton") and find_spec(request.param) is None:
        pytest.skip(f"no {request.param} here")
    return request.param


def tokens(device: str) -> dict:
    x = detached(make_inputs(B, 1, 2, 16, 24, alpha=True, dtype=torch.float32))
    return {name: x[name][:, 0].to(device) for name in NAMES}


def pools(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous ones, [P, H, K, V] and [P, H, K]."""
    g = torch.Generator().manual_seed(3)
    state = torch.randn(P, 2, 16, 24, generator=g)
    return state.to(device), torch.rand(P, 2, 16, generator=g).to(device)


def paged(x: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """A copy whose places lie in pages with other things before and after them: ones."""
    size = x[0].numel()
    pages = x.new_ones(len(x), before + size + after)
    view = pages[:, before : before + size].view(x.shape)
    view.copy_(x)
    return view


def untouched(view: torch.Tensor) -> bool:
    """Whether the pages of `paged` still hold ones around the places."""
    pages = view._base
    assert pages is not None
    return int((pages == 1).sum()) >= pages.numel() - view.numel()


def step(backend, x, state, precond, slots=None, write_slots=None, **options) -> torch.Tensor:
    options = {"beta_aware": True, **BOX} | options
    device = x["q"].device
    places = {"slots": slots, "write_slots": write_slots}
    places = {n: None if y is None else torch.tensor(y, device=device) for n, y in places.items()}
    o, *after = online_scaled_delta_step(
        **x, state=state, precond=precond, backend=backend, **places, **options
    )
    assert after[0] is state and after[1] is precond
    return o


@pytest.mark.parametrize("slots", [None, [7, 0, 3, 5]], ids=["rows", "slots"])
def test_a_paged_pool_gives_the_bits_of_a_contiguous_one(every_backend, slots):
    x = tokens(DEVICES[every_backend])
    S, d = pools(DEVICES[every_backend])
    S, d = (S, d) if slots else (S[:B].clone(), d[:B].clone())
    S_pages, d_pages = paged(S, 5, 11), paged(d, 3, 2)
    assert not S_pages.is_contiguous()
    o = step(every_backend, x, S_pages, d_pages, slots)
    wanted = step(every_backend, x, S, d, slots)
    assert torch.equal(o, wanted) and torch.equal(S_pages, S) and torch.equal(d_pages, d)
    assert untouched(S_pages) and untouched(d_pages)


def test_reads_one_place_and_writes_another(every_backend):
    """As a step in place would leave it, with the places that are only read as they were."""
    x = tokens(DEVICES[every_backend])
    S, d = pools(DEVICES[every_backend])
    in_place, d_in_place = S.clone(), d.clone()
    wanted = step(every_backend, x, in_place, d_in_place, [7, 0, 3, 5])
    S_pages, d_pages = paged(S, 5, 11), paged(d, 3, 2)
    o = step(every_backend, x, S_pages, d_pages, [7, 0, 3, 5], [1, 0, 2, 8])
    assert torch.equal(o, wanted)
    expected, d_expected = S.clone(), d.clone()
    for read, write in ((7, 1), (0, 0), (3, 2), (5, 8)):
        expected[write], d_expected[write] = in_place[read], d_in_place[read]
    assert torch.equal(S_pages, expected) and torch.equal(d_pages, d_expected)


def test_several_rows_read_one_place(every_backend):
    """As speculation does: one memory, several next tokens."""
    x = tokens(DEVICES[every_backend])
    S, d = pools(DEVICES[every_backend])
    before, d_before = S.clone(), d.clone()
    o = step(every_backend, x, S, d, [6, 6, 6, 6], [0, 1, 2, 3])
    copies, d_copies = before[[6] * 4].clone(), d_before[[6] * 4].clone()
    assert torch.equal(o, step(every_backend, x, copies, d_copies))
    assert torch.equal(S[:4], copies) and torch.equal(d[:4], d_copies)
    assert torch.equal(S[4:], before[4:]) and torch.equal(d[4:], d_before[4:])


@pytest.mark.parametrize(
    "slots, write_slots",
    [
        ([2, -1, -1, 6], None),
        ([2, -1, -1, 6], [2, -1, -1, 6]),
        ([2, 4, -3, 6], [2, -1, 5, 6]),
    ],
)
def test_any_number_of_rows_may_be_empty(every_backend, slots, write_slots):
    """A server fills a batch up with rows of one empty place; nothing is written for them."""
    x = tokens(DEVICES[every_backend])
    S, d = pools(DEVICES[every_backend])
    alone, d_alone = S.clone(), d.clone()
    o = step(every_backend, x, S, d, slots, write_slots)
    rows = {n: y[[0, 3]] for n, y in x.items()}
    wanted = step(every_backend, rows, alone, d_alone, [2, 6])
    assert torch.equal(o[[0, 3]], wanted)
    assert torch.equal(S, alone) and torch.equal(d, d_alone)


REFUSED = {
    "write twice": (
        [0, 1, 2, 3],
        [4, 5, 4, 6],
        "write_slots: expected distinct places, got 4 more",
    ),
    "read what is written": (
        [0, 1, 2, 3],
        [4, 5, 1, 6],
        "write_slots: expected places that no other row reads, got 1, which row 2 writes and row 1",
    ),
    "beyond": ([0, 1, 2, 3], [4, 5, 6, 9], "write_slots: expected places less than P = 9"),
    "no slots": (None, [4, 5, 6, 7], "write_slots: expected none without slots"),
    "shape": ([0, 1, 2, 3], [4], "write_slots: expected shape (4,) ([B])"),
}


@pytest.mark.parametrize("slots, write_slots, message", REFUSED.values(), ids=REFUSED)
def test_wrong_places_are_named(slots, write_slots, message):
    with pytest.raises(ValueError) as error:
        step("auto", tokens("cpu"), *pools("cpu"), slots, write_slots)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", ["overlap", "transposed"])
def test_places_must_be_whole_and_apart(kind):
    S, d = pools("cpu")
    if kind == "overlap":
        S = torch.zeros(9000).as_strided(S.shape, (700, 384, 24, 1))
    else:
        S = S.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match=r"state: expected a torch\.float32 tensor whose places"):
        step("auto", tokens("cpu"), S, d, [0, 1, 2, 3])
