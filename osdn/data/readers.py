"""Readers of text, JSONL and Parquet files, each from an offset on, in bounded memory.

A reader is called as reader(path, offset, option) and yields (text, where, offset after it, whether
the same document continues there). `where` is the place for an error message. A long document comes
in pieces, since a tokenizer takes 200 bytes of memory for a byte of text. Within a document of a
JSONL or Parquet file the offset is a pair: the record's, and characters of its text.
"""

from collections.abc import Iterator
from typing import Any

from osdn.data.files import SourceFile
from osdn.errors import UserError
from osdn.system.outside import Malformed, parse_json

PIECE = 1 << 18  # bytes of a text file, characters of a record; a longer document is cut
LONGEST = 1 << 28  # bytes of a JSONL line or a Parquet row, which are read whole
ROWS = 64  # Parquet rows decoded at once,
DECODED = 1 << 24  # or fewer, where they have more bytes than this
COMPRESSED = {
    b"\x1f\x8b": "end its name in .gz",
    b"\x28\xb5\x2f\xfd": "end its name in .zst",
    b"\xfd7zXZ": "unpack it",  # xz
    b"BZh": "unpack it",  # bzip2
    b"PK\x03\x04": "unpack it",  # zip
}

Offset = int | tuple[int, int]
Found = Iterator[tuple[str, str, Offset, bool]]


def read_text(path: SourceFile, offset: Offset, separator: str | None) -> Found:
    """Documents between separators; without one the file is one document. Offsets are bytes.

    A document longer than PIECE bytes comes in pieces that end at a line's end where there is one.
    """
    if isinstance(offset, tuple):
        raise UserError(f"data.corpus: {path}: expected a byte as a position, got {offset}")
    # In bytes, since offsets are; a separator lies between whole characters in UTF-8.
    mark = (separator or "").encode()
    with path.opened(offset) as file:
        # A window over the file: never more than two pieces of it.
        buffer, at, ended = b"", 0, False
        while not ended or at < len(buffer):
            if not ended and len(buffer) - at <= PIECE + len(mark):
                more = file.read(PIECE + len(mark))
                buffer, at, ended = buffer[at:] + more, 0, not more
                continue
            # Every separator that starts in the first PIECE bytes lies whole in the buffer.
            found = buffer.find(mark, at, at + PIECE + len(mark)) if mark else -1
            goes_on = found < 0 and len(buffer) - at > PIECE
            # At a separator; else cut, if it is too long; else the rest of the file.
            end = found if found >= 0 else _cut(buffer, at) if goes_on else len(buffer)
            text = decode(buffer[at:end], path, offset)
            where = f"byte {offset}"
            # Behind the separator, where the next document begins.
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


def pieces(text: str, at: int = 0) -> Iterator[tuple[str, int, bool]]:
    """A record's text from a character on: (piece, where it ends, whether there is more).

    A piece ends at a line's end where there is one.
    """
    while len(text) - at > PIECE:
        line = text.rfind("\n", at, at + PIECE)
        end = line + 1 if line >= 0 else at + PIECE
        yield text[at:end], end, True
        at = end
    yield text[at:], len(text), False


def read_jsonl(path: SourceFile, offset: Offset, field: str) -> Found:
    """One JSON object a line, its text in `field`. Offsets are bytes."""
    offset, inside = offset if isinstance(offset, tuple) else (offset, 0)
    with path.opened(offset) as file:
        # One byte more than allowed: so a longer line is seen, and not cut in silence.
        while raw := file.readline(LONGEST + 1):
            where = f"byte {offset}"
            if len(raw) > LONGEST:
                raise UserError(
                    f"data.corpus: {path}, {where}: expected a line of at most {LONGEST:,} bytes; "
                    "divide its text into several records"
                )
            after = offset + len(raw)
            if not raw.isspace():  # blank lines are none
                try:
                    record: Any = parse_json(raw, Any, "")  # type: ignore[arg-type]
                except Malformed as error:
                    decode(raw, path, offset)  # names the byte, if one is not UTF-8
                    raise UserError(
                        f"data.corpus: {path}, {where}: {error.reason}; correct or delete the line"
                    ) from error
                text = _field(record, field, path, where)
                # A line may have hundreds of megabytes: only its text stays while it is encoded.
                raw, record = b"", None
                for piece, end, more in pieces(text, inside):
                    yield piece, where, (offset, end) if more else after, more
            offset, inside = after, 0


def read_parquet(path: SourceFile, offset: Offset, field: str) -> Found:
    """The texts of one column. Offsets are rows."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(
            f"data.corpus: {path} needs the pyarrow package: pip install 'osdn[data]'"
        ) from error
    if path.compression:
        raise UserError(f"data.corpus: {path}: expected a Parquet file as it is; unpack it")
    first, inside = offset if isinstance(offset, tuple) else (offset, 0)
    try:
        with path.stored() as stored, ParquetFile(stored) as file:
            names = file.schema_arrow.names
            if field not in names:
                _field(dict.fromkeys(names), field, path, "its columns")  # raises
            # Row groups behind the offset are passed over by their metadata, without decoding.
            row = 0  # number of the next row
            for group in range(file.num_row_groups):
                described = file.metadata.row_group(group)
                if row + described.num_rows <= first:
                    row += described.num_rows
                    continue
                # Memory is bounded by bytes, not rows: a row may be a word or a book.
                many = _rows_at_once(described, field, path, row)
                for batch in file.iter_batches(many, row_groups=[group], columns=[field]):
                    for value in batch.column(0):
                        if row >= first:
                            where = f"row {row}"
                            text = _field({field: value.as_py()}, field, path, where)
                            for piece, end, more in pieces(text, inside):
                                yield piece, where, (row, end) if more else row + 1, more
                            inside = 0
                        row += 1
    except (ArrowException, UnicodeDecodeError, OSError) as error:
        # Arrow raises OSError for damage too, without a number: trying again would not help.
        if getattr(error, "errno", None) is not None:  # of the disk or network: worth another try
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(f"data.corpus: {path}: damaged Parquet file: {reason}") from error


def _rows_at_once(group: Any, field: str, path: SourceFile, row: int) -> int:
    """Rows of a Parquet file's row group that are decoded together, by their mean size.

    Raises:
        UserError: they are longer than LONGEST.
    """
    columns = (group.column(i) for i in range(group.num_columns))
    size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == field)
    mean = size // max(1, group.num_rows)
    if mean > LONGEST:
        raise UserError(
            f"data.corpus: {path}, row {row}: expected rows of at most {LONGEST:,} bytes, found "
            f"{mean:,} on average; divide the texts into several rows"
        )
    return max(1, min(ROWS, DECODED // max(1, mean)))


def decode(data: bytes, path: SourceFile, offset: int) -> str:
    """UTF-8 text; the error names the file and the byte's offset in it."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        for start, advice in COMPRESSED.items():
            if offset == 0 and data.startswith(start):
                raise UserError(f"data.corpus: {path} is compressed; {advice}") from error
        raise UserError(
            f"data.corpus: {path} is not UTF-8 at byte {offset + error.start} "
            f"(0x{data[error.start]:02x}); convert it (iconv -t UTF-8) or leave it out"
        ) from error


def _field(record: Any, field: str, path: SourceFile, where: str) -> str:
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
