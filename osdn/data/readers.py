"""Readers of text, JSONL and Parquet files, each from an offset on, in bounded memory.

A reader is called as reader(path, offset, option) and yields (text, where, offset after it,
whether the same document goes on there). `where` is the place for an error message.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from osdn.errors import UserError

PIECE = 1 << 18  # bytes; a longer document of a text file is read in pieces
ROWS = 64  # Parquet rows decoded at once
COMPRESSED = (
    b"\x1f\x8b",
    b"\x28\xb5\x2f\xfd",
    b"\xfd7zXZ",
    b"BZh",
    b"PK\x03\x04",
)  # gz, zst, xz, bz2, zip

Found = Iterator[tuple[str, str, int, bool]]


def read_text(path: Path, offset: int, separator: str | None) -> Found:
    """Documents between separators; without one the file is one document. Offsets are bytes.

    A document longer than PIECE bytes comes in pieces that end at a line's end where there is one.
    """
    mark = (separator or "").encode()
    with path.open("rb") as file:
        file.seek(offset)
        buffer, at, ended = b"", 0, False
        while not ended or at < len(buffer):
            if not ended and len(buffer) - at <= PIECE + len(mark):
                more = file.read(PIECE + len(mark))
                buffer, at, ended = buffer[at:] + more, 0, not more
                continue
            # Every separator that starts in the first PIECE bytes lies whole in the buffer.
            found = buffer.find(mark, at, at + PIECE + len(mark)) if mark else -1
            goes_on = found < 0 and len(buffer) - at > PIECE
            end = found if found >= 0 else _cut(buffer, at) if goes_on else len(buffer)
            text = decode(buffer[at:end], path, offset)
            where = f"byte {offset}"
            offset += end - at + (len(mark) if found >= 0 else 0)
            at = end + (len(mark) if found >= 0 else 0)
            yield text, where, offset, goes_on


def _cut(buffer: bytes, at: int) -> int:
    """The end of a piece of at most PIECE bytes: after a line break, else between characters."""
    line = buffer.rfind(b"\n", at, at + PIECE)
    if line >= 0:
        return line + 1
    end = at + PIECE
    while end > at + 1 and buffer[end] & 0b1100_0000 == 0b1000_0000:  # inside a character
        end -= 1
    return end


def read_jsonl(path: Path, offset: int, field: str) -> Found:
    """One JSON object a line, its text in `field`. Offsets are bytes."""
    with path.open("rb") as file:
        file.seek(offset)
        for raw in file:
            where = f"byte {offset}"
            line = decode(raw, path, offset)
            offset += len(raw)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # a ValueError: a number of 4,301 digits
                reason = getattr(error, "msg", error)
                raise UserError(
                    f"data.corpus: {path}, {where}: not JSON: {reason}; mend or delete the line"
                ) from error
            yield _field(record, field, path, where), where, offset, False


def read_parquet(path: Path, offset: int, field: str) -> Found:
    """The texts of one column. Offsets are rows."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(
            f"data.corpus: {path} needs the pyarrow package: pip install 'osdn[data]'"
        ) from error
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                _field(dict.fromkeys(names), field, path, "its columns")  # raises
            groups = range(file.num_row_groups)
            starts = [0]
            for group in groups:
                starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
            wanted = [group for group in groups if starts[group + 1] > offset]
            row = starts[wanted[0]] if wanted else 0
            for batch in file.iter_batches(ROWS, row_groups=wanted, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    if row > offset:
                        where = f"row {row - 1}"
                        text = _field({field: value.as_py()}, field, path, where)
                        yield text, where, row, False
    except (ArrowException, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"data.corpus: {path}: damaged Parquet file: {reason}") from error


def decode(data: bytes, path: Path, offset: int) -> str:
    """UTF-8 text; the error names the file and the byte's offset in it."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if offset == 0 and data.startswith(COMPRESSED):
            raise UserError(f"data.corpus: {path} is compressed; unpack it") from error
        raise UserError(
            f"data.corpus: {path} is not UTF-8 at byte {offset + error.start} "
            f"(0x{data[error.start]:02x}); convert it (iconv -t UTF-8) or leave it out"
        ) from error


def _field(record: Any, field: str, path: Path, where: str) -> str:
    """The record's text; a null is an empty one."""
    if isinstance(record, dict) and field in record:
        value = "" if record[field] is None else record[field]
        if isinstance(value, str):
            return value
        found = f"{type(value).__name__} there"
    elif isinstance(record, dict):
        found = f"only {', '.join(record)}"
    else:
        found = f"no object but {type(record).__name__}"
    raise UserError(
        f"data.text_field: {path}, {where}: expected text in {field!r}, found {found}; "
        "set data.text_field to the column that holds the text"
    )


READERS = {".jsonl": read_jsonl, ".ndjson": read_jsonl, ".parquet": read_parquet}
