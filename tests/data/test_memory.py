"""`osdn tokenize` of a long document: memory that its form explains, and no more.

`python benchmarks/tokenize_memory.py --megabytes 200` measures the same on a longer one.
"""

import sys

import pytest

from benchmarks.tokenize_memory import FORMS, document, peak, write

SIZE = 24_000_000  # bytes; a tokenizer that gets it whole takes 200 times that
# A line is there as bytes, as text and as the record's text, which takes two bytes a character
# here; a Parquet row as Arrow's bytes, decoded and as text. A text file is read in pieces.
COPIES = {"text": 0, "jsonl": 6, "parquet": 6}
PIECES = 200e6  # bytes: pieces that wait to be encoded, tokens, what the first use loads


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", FORMS)
def test_the_peak_of_a_long_document_is_bounded(form, tmp_path):
    text = document(SIZE)
    marks = []
    for size in (20, len(text)):
        directory = tmp_path / str(size)
        directory.mkdir()
        path = write(text[:size], form, directory)
        marks.append(peak(path, directory / "out"))
    start, most = marks
    assert most - start < PIECES + COPIES[form] * len(text.encode())
