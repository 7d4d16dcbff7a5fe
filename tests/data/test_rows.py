"""Rows dealt to ranks: one global order for every number of ranks, and exact resumption on any."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osdn.data import RankRows, Row, RowSource, byte_tokenizer, open_corpus, open_rows
from osdn.errors import UserError
from tests.train.tiny import HANG


def make_source(directory, files=12, lanes=1, documents=15):
    directory.mkdir(exist_ok=True)
    for i in range(files):
        texts = (f"{i}.{j} " * (3 + (7 * i + j) % 31) for j in range(documents))
        (directory / f"{i:03}.txt").write_text("|".join(texts))
    return RowSource(
        corpus=open_corpus(str(directory), separator="|"),
        tokenizer=byte_tokenizer(),
        length=64,
        fraction=0.1,
        shuffle_bytes=3000,
        seed=0,
        lanes=lanes,
    )


def ranks(source, world, workers=0):
    return [open_rows(source, rank=rank, world=world, workers=workers) for rank in range(world)]


def deal(rows, count):
    """The next `count` rows of each rank, put back into the global order."""
    parts = [[next(each) for _ in range(count)] for each in rows]
    return [parts[i % len(rows)][i // len(rows)] for i in range(count * len(rows))]


@pytest.mark.parametrize("files", [1, 4, 12])
@pytest.mark.parametrize("lanes", [1, 4, 6])
def test_the_global_order_does_not_depend_on_the_number_of_ranks(files, lanes, tmp_path):
    source = make_source(tmp_path, files, lanes)
    whole = deal(ranks(source, 1), 120)
    for world in (2, 3, 4, 8):
        assert deal(ranks(source, world), 120 // world) == whole


def test_one_lane_is_the_order_of_the_stream(tmp_path):
    source = make_source(tmp_path)
    stream = source.lane(0)
    assert deal(ranks(source, 1), 50) == [next(stream) for _ in range(50)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([(1, 0), (2, 0), (3, 0), (4, 0), (6, 0)]), min_size=2, max_size=4),
    st.integers(0, 4),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([2, 12]),
)
def test_any_other_number_of_ranks_goes_on_exactly(tmp_path_factory, worlds, steps, lanes, files):
    source = make_source(tmp_path_factory.mktemp("texts"), files, lanes)
    batch = 12  # rows a step, whatever the world
    whole = deal(ranks(source, 1), batch * (steps + 1) * len(worlds))
    states, found = [], []
    for world, _ in worlds:
        rows = ranks(source, world)
        for each in rows:
            if states:
                each.load_state_dict(states[::-1])  # in any order
        found += deal(rows, batch * (steps + 1) // world)
        states = [each.state_dict() for each in rows]
    assert found == whole


def test_every_document_comes_once_in_an_epoch_of_all_lanes(tmp_path):
    for files in (1, 5, 12):
        source = make_source(tmp_path / str(files), files, lanes=4)
        seen = []
        for index in range(4):
            documents = source.lane(index).documents
            while documents.state["epoch"] == 0:
                seen.append(next(documents))
            seen.pop()  # the second epoch's first
        everything = [document for document, _ in source.corpus.read()]
        training = [d.text for d in everything if d.key >= 0.1 * 2**64]
        assert sorted(seen) == sorted(training) and len(set(seen)) == len(seen) > 10


def test_a_lane_whose_files_hold_nothing_in_one_epoch_goes_on_to_the_next(tmp_path):
    for i in range(40):  # held out are a few of these; a lane has one or two files in an epoch
        (tmp_path / f"{i:02}.txt").write_text(f"{i} " * 20)
    corpus = open_corpus(str(tmp_path))
    source = RowSource(
        corpus=corpus, tokenizer=byte_tokenizer(), length=64, fraction=0.2,
        shuffle_bytes=1000, seed=0, lanes=24,
    )  # fmt: skip
    rows = RankRows(source.lane, 24)
    for _ in range(2000):
        next(rows)
    assert any(lane.documents.state["epoch"] > 3 for lane in rows._lanes.values())
    with pytest.raises(UserError, match="no training document in it"):
        next(RankRows(replace(source, fraction=0.9999).lane, 24))


def test_hub_streams_are_shared_too(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for part in range(4):
        texts = [f"{part}.{i} " * (1 + i % 9) for i in range(60)]
        pq.write_table(pa.table({"text": texts}), tmp_path / f"part{part}.parquet")
    for lanes in (1, 2, 8):
        source = RowSource(
            corpus=open_corpus(f"hf:{tmp_path}"), tokenizer=byte_tokenizer(), length=64,
            fraction=0.0, shuffle_bytes=2000, seed=0, lanes=lanes,
        )  # fmt: skip
        whole = deal(ranks(source, 1), 96)
        first = ranks(source, 2)
        assert deal(first, 24) == whole[:48]
        rest = ranks(source, 4)
        for each in rest:
            each.load_state_dict([rows.state_dict() for rows in first])
        assert deal(rest, 12) == whole[48:]


def test_states_that_do_not_belong_together_are_refused(tmp_path):
    source = make_source(tmp_path, lanes=2)
    pair = ranks(source, 2)
    deal(pair, 3)
    states = [rows.state_dict() for rows in pair]
    fresh = open_rows(source)
    for wrong in ([], states[:1], [states[0], states[0]]):
        with pytest.raises(UserError, match="expected those of all ranks after the same step"):
            fresh.load_state_dict(wrong)
    next(pair[0]), next(pair[0])
    with pytest.raises(UserError, match="after the same step"):
        fresh.load_state_dict([pair[0].state_dict(), states[1]])
    with pytest.raises(UserError, match=r"data\.lanes: .* saved with 2, and this run asks for 4"):
        open_rows(make_source(tmp_path, lanes=4)).load_state_dict(states)
    with pytest.raises(ValueError, match="rank < world"):
        RankRows(source.lane, 2, rank=2, world=2)


def test_state_is_small_and_plain_enough_for_a_safe_load(tmp_path):
    rows = open_rows(make_source(tmp_path, lanes=3), rank=1, world=2)
    for _ in range(20):
        next(rows)
    torch.save(rows.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == rows.state_dict()
    assert (tmp_path / "state.pt").stat().st_size < 4000


def test_workers_change_neither_rows_nor_states(tmp_path):
    source = make_source(tmp_path, lanes=2)
    plain, helped = ranks(source, 1), ranks(source, 1, workers=2)
    before = torch.get_rng_state()
    assert helped[0].state_dict()["streams"][0]["next"] == 0
    assert deal(helped, 41) == deal(plain, 41)
    odd = [helped[0].state_dict()]
    assert deal(helped, 1) == deal(plain, 1)
    assert torch.equal(torch.get_rng_state(), before)
    expected = deal(plain, 30)
    states = [helped[0].state_dict()]  # of the rows taken, though more are made
    helped[0].close()
    for world, workers in ((2, 0), (3, 0), (1, 0), (2, 1)):
        again = ranks(source, world, workers)
        for rows in again:
            rows.load_state_dict(states)
        assert deal(again, 30 // world) == expected[: 30 // world * world]
        for rows in again:
            rows.close()
    helped[0].load_state_dict(odd)  # the second worker's turn
    assert deal(helped, 31)[1:] == expected
    helped[0].close()


def test_a_workers_error_is_the_same_one_line(tmp_path):
    source = make_source(tmp_path)
    (tmp_path / "005.txt").write_bytes(b"\xff" * 5 * (tmp_path / "005.txt").stat().st_size)
    rows = open_rows(source, workers=1)
    with pytest.raises(UserError, match=r"005\.txt is not UTF-8 at byte 0") as caught:
        deal([rows], 1000)
    assert "\n" not in str(caught.value)


CHILD = """
import sys, tests.data.test_rows as t
from pathlib import Path
if __name__ == "__main__":
    rows = t.open_rows(t.make_source(Path(sys.argv[1])), workers=1)
    t.deal([rows], 3)
    print(next(iter(rows._rows._workers)).pid, flush=True)
    t.deal([rows], 10**9)
"""


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_in_one_line(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = subprocess.Popen(
        [sys.executable, tmp_path / "child.py", tmp_path / "texts"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert run.stdout is not None
    os.kill(int(run.stdout.readline()), signal.SIGKILL)
    _, errors = run.communicate(timeout=HANG)
    assert "UserError: data.workers: DataLoader worker" in errors and "killed" in errors


LEFT_OPEN = """
import gc, sys, tests.data.test_rows as t
from pathlib import Path
if __name__ == "__main__":
    rows = t.open_rows(t.make_source(Path(sys.argv[1])), workers=1)
    t.deal([rows], 3)
    {then}
"""


@pytest.mark.slow
@pytest.mark.parametrize("then", ["", "rows.itself = rows; del rows; gc.collect()"])
def test_python_ends_though_rows_were_not_closed(then, tmp_path):
    """In use to the end, or collected in a cycle, as after an error whose traceback is kept."""
    (tmp_path / "child.py").write_text(LEFT_OPEN.format(then=then))
    subprocess.run(
        [sys.executable, tmp_path / "child.py", tmp_path / "texts"],
        env={**os.environ, "PYTHONPATH": os.getcwd()}, check=True, timeout=HANG,
    )  # fmt: skip


def test_a_row_passed_over_is_a_row(tmp_path):
    source = make_source(tmp_path)
    one, other = source.lane(0), source.lane(0)
    for turn in range(60):
        if turn % 3:
            next(one)
            other.skip()
            assert one.state_dict() == other.state_dict()
        else:
            row = next(one)
            assert isinstance(row, Row) and row == next(other)
