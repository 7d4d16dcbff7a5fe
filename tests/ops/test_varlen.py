"""The layout of chunks: every token in its place, once, and padding neutral."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osdn.ops.chunkwise import layout as varlen
from osdn.ops.chunkwise.layout import Layout, RaggedLayout, layout_of, size_of


def ragged(lengths: list[int], H: int) -> RaggedLayout:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return RaggedLayout(offsets, sum(lengths), H)


def expected_rows(x: torch.Tensor, bounds: list[tuple[int, int, int]], C: int):
    """Rows by the definition: step by step, the longest sequences first, then heads."""
    order = sorted(range(len(bounds)), key=lambda n: bounds[n][1] - bounds[n][2])
    rows = []
    for step in range(max(-(-(stop - start) // C) for _, start, stop in bounds)):
        for b, start, stop in (bounds[n] for n in order):
            if start + step * C >= stop:
                continue
            for h in range(x.shape[2]):
                row = x.new_zeros(C, *x.shape[3:])
                piece = x[b, start + step * C : min(start + (step + 1) * C, stop), h]
                row[: len(piece)] = piece
                rows.append(row)
    return torch.stack(rows)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.integers(1, 3))
def test_a_pack_is_cut_by_the_definition_and_put_back(lengths, H):
    layout = ragged(lengths, H)
    T, steps = sum(lengths), len(layout.active)
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    bounds = [(0, start, start + length) for start, length in zip(starts, lengths)]
    for shape in ((1, T, H), (1, T, H, 3)):
        x = torch.randn(shape)
        rows = layout.load(x, 0, steps, torch.float64)
        assert torch.equal(rows, expected_rows(x.double(), bounds, layout.C))
        back = torch.full_like(x, float("nan"))
        for i, j in layout.groups(rows=2 * H):
            layout.store(layout.load(x, i, j, torch.float64), back, i, j)
        assert torch.equal(back, x)
    per_sequence = torch.randn(len(lengths), H, 2)
    assert torch.equal(layout.unsort(layout.sort(per_sequence)), per_sequence)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 130), st.integers(1, 3))
def test_a_batch_is_cut_by_the_definition_and_put_back(B, T, H):
    layout = Layout(B, T, H)
    bounds = [(b, 0, T) for b in range(B)]
    for shape in ((B, T, H), (B, T, H, 3)):
        x = torch.randn(shape).transpose(0, 0)
        rows = layout.load(x, 0, len(layout.active), torch.float64)
        assert torch.equal(rows, expected_rows(x.double(), bounds, layout.C))
        back = torch.full_like(x, float("nan"))
        for i, j in layout.groups(rows=2 * B * H):
            layout.store(layout.load(x, i, j, torch.float64), back, i, j)
        assert torch.equal(back, x)


def test_a_batch_and_the_same_sequences_packed_have_the_same_rows():
    x = torch.randn(3, 70, 2, 5)
    batch, pack = Layout(3, 70, 2), ragged([70] * 3, 2)
    packed = x.reshape(1, 210, 2, 5)
    rows = batch.load(x, 0, 3, torch.float32)
    assert torch.equal(rows, pack.load(packed, 0, len(pack.active), torch.float32))


def test_groups_cover_every_step_once_within_the_limit():
    layout = ragged([500, 400, 33, 5, 1], 2)
    sizes = layout.sizes(0, len(layout.active))
    for limit in (1, 4, 10, 1000):
        groups = layout.groups(limit)
        assert [s for i, j in groups for s in range(i, j)] == list(range(len(sizes)))
        assert all(j == i + 1 or sum(sizes[i:j]) <= limit for i, j in groups)


@pytest.mark.parametrize(
    "T, C", [(1, 8), (8, 8), (9, 16), (17, 32), (32, 32), (33, 32), (9999, 32)]
)
def test_short_sequences_get_short_chunks(T, C):
    assert Layout(1, T, 1).C == C


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=20), st.integers(1, 3))
def test_room_for_all_rows_is_told_without_a_look_at_the_offsets(lengths, H):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    layout = ragged(lengths, H)
    C, room = size_of(torch.empty(1, sum(lengths), H, 0), offsets)
    assert layout.C == C and layout.rows(0, len(layout.active)).stop <= room
    assert room * C <= H * max(3 * sum(lengths), 8 * len(lengths) + sum(lengths))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 130), st.integers(1, 3))
def test_room_for_a_batch_is_exact_and_groups_share_it(B, T, H):
    layout = Layout(B, T, H)
    assert size_of(torch.empty(B, T, H, 0), None) == (layout.C, layout.rows(0, 99).stop)
    rows = [layout.rows(i, j) for i, j in layout.groups(rows=2 * B * H)]
    assert rows[0].start == 0 and all(a.stop == b.start for a, b in pairwise(rows))


def test_the_layout_of_the_last_offsets_is_kept_until_they_change(monkeypatch):
    made = []

    class Counted(RaggedLayout):
        def __init__(self, *args) -> None:
            made.append(args)
            super().__init__(*args)

    monkeypatch.setattr(varlen, "RaggedLayout", Counted)
    offsets, x = torch.tensor([0, 3, 10]), torch.zeros(1, 10, 2, 4)
    first = layout_of(x, offsets)
    assert layout_of(x, offsets) is first and len(made) == 1
    offsets[1] = 5
    changed = layout_of(x, offsets)
    assert len(made) == 2 and changed.active == [2] and changed.padding.sum() == 2 * 8 - 10
    assert layout_of(x, offsets.clone()) is not changed and len(made) == 3
    assert layout_of(torch.zeros(1, 10, 3, 4), offsets).H == 3
