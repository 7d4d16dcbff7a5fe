"""Documents of a dataset on the Hugging Face Hub, streamed."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from osdn.data.documents import WHOLE, Document, Share, content_key
from osdn.data.readers import pieces
from osdn.errors import UserError
from osdn.system.hub import hub_is_reachable
from osdn.system.outside import shown
from osdn.system.retry import persevere

HUB = "hf:"


class HubCorpus:
    """A streamed Hugging Face dataset, file by file.

    A position is [file number in this order, records of it done, texts of the group]. Within a long
    text, which comes in pieces, two more numbers follow: characters of it done, and its key.
    datasets' own state is not used: an iteration leaves it behind in the dataset for the next, and
    its resumption has skipped or repeated records (its issues 8145, 8308); it reads the file under
    way again from its start, as this does.
    """

    def __init__(self, name: str, *, subset: str | None, split: str, text_field: str) -> None:
        try:
            # An extra, and slow to import: only who names a hub dataset pays for it.
            from datasets import load_dataset
        except ImportError as error:
            raise UserError(
                f"data.corpus: '{HUB}{name}' needs the datasets package: pip install 'osdn[data]'"
            ) from error
        if not Path(name).is_dir() and not hub_is_reachable():
            raise UserError(
                f"data.corpus: no network to stream '{HUB}{name}' from the Hugging Face Hub; "
                "connect, or name local files or 'stdlib'"
            )
        try:
            self.dataset = load_dataset(name, subset, split=split, streaming=True)
        except (OSError, ValueError, RuntimeError) as error:  # its errors derive from these
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"data.corpus: cannot open '{HUB}{name}': {reason}") from error
        self.name, self.text_field = name, text_field
        self.size: int | None = None  # a stream does not tell
        # The number of files is part of it: shards of another revision are other shares.
        self.fingerprint = repr([name, subset, split, text_field, self.dataset.num_shards])

    def read(
        self, *, order: str | None = None, position: Any = None, share: Share = WHOLE
    ) -> Iterator[tuple[Document, Any]]:
        files = list(range(self.dataset.num_shards))
        if order is not None:
            Random(order).shuffle(files)
        groups, group, every, mine = share.among(len(files))
        files = files[group::groups]
        first, done, count, inside, key = _place(position)
        for number, file in enumerate(files[first:], start=first):
            for record, after in self._records(file, done):
                # `after` counts from 1, records from 0.
                where = f"{self._file(file)}, record {after - 1}"
                for text, end, more in pieces(self._text(record), inside):
                    key = content_key(text, where) if key is None else key
                    document, behind = Document(text, key), [number, after, None]
                    if more:
                        # Inside a record: those before it are done, and `end` characters of it.
                        behind = [number, after - 1, None, end, key]
                    else:
                        key = None
                    if text:
                        count += 1
                        if (count - 1) % every == mine:
                            behind[2] = count
                            yield document, behind
                inside = 0
            done = 0

    def _text(self, record: dict[str, Any]) -> str:
        """A record's text; a null is an empty one."""
        text = record.get(self.text_field, 0)
        text = "" if text is None else text
        if not isinstance(text, str):
            raise UserError(
                f"data.text_field: the records of '{HUB}{self.name}' have no text in "
                f"{self.text_field!r}; they have {', '.join(record)}"
            )
        return text

    def _file(self, file: int) -> str:
        return f"'{HUB}{self.name}', file {file} (from 0)"

    def _records(self, file: int, done: int) -> Iterator[tuple[dict, int]]:
        """The records of a file behind the first `done`, however often it must be opened again."""

        def read() -> Iterator[tuple[dict, int]]:
            nonlocal done
            # One file as a dataset of its own, which can be opened again without the others.
            records = iter(self.dataset.shard(self.dataset.num_shards, file))
            for record in islice(records, done, None):
                done += 1
                yield record, done

        return persevere(read, lambda: self._file(file))

    def done(self, position: Any) -> int:
        """Records with text that are behind a position."""
        return int(position[2])


def _place(position: Any) -> tuple[int, int, int, int, int | None]:
    """A position, as far as it can be checked without reading.

    Raises:
        UserError: it is not one of a hub dataset.
    """
    if position is None:
        return 0, 0, 0, 0, None
    numbers = isinstance(position, list | tuple) and len(position) in (3, 5)
    if not numbers or any(type(x) is not int or x < 0 for x in position):
        raise UserError(
            f"data.corpus: {shown(position)} is no position in a hub dataset; the state that holds "
            "it is damaged: use an earlier one"
        )
    first, done, count, *rest = position
    inside, key = rest or (0, None)
    return first, done, count, inside, key
