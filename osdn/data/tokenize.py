"""Text to shards of tokens, by several processes, to be gone on with after any interruption.

One process reads the documents in the corpus's sorted order and writes; the others encode batches
of them. A shard ends with the document that brings it to `shard_tokens` tokens, so that the shards
depend on the text and the tokenizer alone: neither on the number of processes nor on interruptions.
Its files appear under their names when they are whole and on the disk, the .json last. What has no
.json, or not the bytes that its .json tells, is made again from the shard before's source position.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from hashlib import sha256
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from osdn.data.documents import Corpus, Document
from osdn.data.repair import ShardNote, finished_shard
from osdn.data.shards import JOB, KIND, MANIFEST, Shard, tokenizer_fingerprint
from osdn.data.token_corpus import ENTRY
from osdn.data.tokenizers import encode_document, vocabulary_size
from osdn.errors import UserError
from osdn.system.files import TEMPORARY, flush, write_json
from osdn.system.locks import DirectoryLock
from osdn.system.outside import read_json, shown
from osdn.system.processes import follow_parent, process_context

# Large enough that sending it costs little beside encoding it.
BATCH = 1 << 20  # UTF-8 bytes that are sent to a process at a time
LOCK = ".tokenize.lock"
BUSY = "another osdn tokenize writes there; wait until it has ended, or choose another --out"

Batch = list[tuple[Document, Any]]
Result = Callable[[], list[NDArray[Any]]]


class Encoded(NamedTuple):
    """A document's tokens, key, UTF-8 bytes, and the source's position after it."""

    tokens: NDArray[Any]
    key: int
    bytes: int
    position: Any


def write_shards(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    name: str,
    shard_tokens: int,
    processes: int,
    bar: "tqdm[Any]",
) -> dict[str, Any]:
    """Write a corpus's shards and manifest into `out`, or finish it; returns the manifest.

    Args:
        name: of the tokenizer, as a recipe would give it.
        shard_tokens: tokens after which a shard ends.
        processes: that encode; 1 does all in this process.
        bar: shown the source's bytes, or its documents where these are not known.

    Raises:
        UserError: another job is in `out`, the disk refuses, a process died, or there is no text.
    """
    # Half the disk and memory traffic for a vocabulary that fits 16 bits.
    kind = np.dtype("<u2" if vocabulary_size(tokenizer) <= 2**16 else "<u4")
    made_by = {
        "name": name,
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "size": len(tokenizer),
    }
    # What a continuation must agree with. Processes are not in it: they change nothing.
    job = {"kind": KIND, "tokenizer": made_by, "dtype": kind.str, "shard_tokens": shard_tokens}
    lock = DirectoryLock(out, LOCK, BUSY)
    lock.take()  # two jobs would delete each other's unfinished files
    try:
        _begin(out, {**job, "source": corpus.fingerprint})
        with Encoder(tokenizer, kind, processes) as encoder:
            shards = list(_shards(corpus, encoder, out, shard_tokens, bar))
        manifest = {**job, **_totals(shards), "shards": [one.model_dump() for one in shards]}
        # Last of all: with it the directory is a corpus, without it a job.
        write_json(out / MANIFEST, manifest)
    except OSError as error:
        raise UserError(
            f"{out}: cannot write there: {error.strerror or error}; the finished shards are kept: "
            "make room and give the same command again"
        ) from error
    finally:
        lock.release()
    return manifest


def _totals(shards: list[Shard]) -> dict[str, int]:
    return {
        field: sum(getattr(shard, field) for shard in shards)
        for field in ("documents", "tokens", "bytes")
    }


def _begin(out: Path, job: dict[str, Any]) -> None:
    """Compare with the job that is in the directory, or note this one there."""
    path = out / JOB
    if path.is_file():
        # Field by field, so that the error says which option is another one.
        before = read_json(path, dict[str, Any], "copy it again, or choose another --out")
        for field, value in job.items():
            if before.get(field) != value:
                raise UserError(
                    f"{out} holds shards of another job: {field} was {shown(before.get(field))}, "
                    f"and is {value} now; choose another --out, or give the command that began it"
                )
    # Nothing is written among files that are not ours.
    elif any(not one.name.startswith((TEMPORARY, LOCK)) for one in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no shards; choose another --out")
    else:
        write_json(path, job)
    # Under the directory's lock, so they are of a job that is gone.
    for leftover in out.glob(f"{TEMPORARY}*"):
        leftover.unlink()


def _shards(
    corpus: Corpus, encoder: "Encoder", out: Path, shard_tokens: int, bar: "tqdm[Any]"
) -> Iterator[Shard]:
    """Every shard in turn, made unless it is there."""
    position: Any = None
    stream: Iterator[Encoded] | None = None
    for number in count():
        name = f"shard_{number:05d}"
        # A shard that is there whole costs a reading and no encoding.
        found = finished_shard(out, name, encoder.dtype)
        if found is not None:
            stream = None  # it stood before this shard, so a later one must be opened behind it
        else:
            if stream is None:
                # From where the last whole shard ended, in the source.
                stream = encoder.documents(corpus, position)
            found, stream = _write_shard(out, name, stream, shard_tokens, encoder.dtype)
        position = found.position
        bar.n = corpus.done(position)  # bytes of the source, or records
        bar.set_postfix_str(f"{number + 1} shards")
        yield found.shard
        if found.last:
            return


def _write_shard(
    out: Path, name: str, stream: Iterator[Encoded], shard_tokens: int, dtype: np.dtype[Any]
) -> tuple[ShardNote, Iterator[Encoded]]:
    """Write one shard; returns what its .json holds, and the rest of the stream."""
    entries: list[tuple[int, int, int]] = []
    total, position = 0, None
    paths = [out / f"{name}.tokens", out / f"{name}.index"]
    digest = sha256()
    with (out / f"{TEMPORARY}{name}.tokens").open("wb") as file:
        # To the disk as they come: a shard is never whole in memory.
        for document in stream:
            data = document.tokens.astype(dtype, copy=False).tobytes()
            file.write(data)
            digest.update(data)
            entries.append((document.key, len(document.tokens), document.bytes))
            total, position = total + len(document.tokens), document.position
            # A shard ends with a document, never within one.
            if total >= shard_tokens:
                break
        flush(file)
    if not entries:
        raise UserError(f"the corpus holds no text, so there is nothing to write to {out}")
    index = np.array(entries, ENTRY)
    with (out / f"{TEMPORARY}{name}.index").open("wb") as file:
        file.write(index.tobytes())
        flush(file)
    digests = [digest.hexdigest(), sha256(index.tobytes()).hexdigest()]
    # Both are on the disk before either has its name.
    for path in paths:
        os.replace(out / f"{TEMPORARY}{path.name}", path)
    # One document ahead: only so is the last shard known to be the last.
    following = next(stream, None)
    shard = Shard(
        name=name,
        documents=len(entries),
        tokens=total,
        bytes=int(index["bytes"].sum(dtype=np.int64)),
        sha256=digests,
    )
    # With the source's position: after a stop the next shard starts here.
    note = ShardNote(shard=shard, position=position, last=following is None)
    # Last: a shard without it is made again.
    write_json(out / f"{name}.json", note.model_dump())
    return note, stream if following is None else chain([following], stream)


class Encoder:
    """Encodes documents in their order, in this process or in several."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[Any], processes: int
    ) -> None:
        self.tokenizer, self.dtype, self.processes = tokenizer, dtype, processes
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Encoder":
        if self.processes > 1:
            # The tokenizer is sent once to each process, not with each batch.
            self.pool = ProcessPoolExecutor(
                self.processes, process_context(), _start_worker, (self.tokenizer, self.dtype)
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def documents(self, corpus: Corpus, position: Any) -> Iterator[Encoded]:
        """The corpus's documents behind a position; at most 3 batches a process are under way."""
        # Results are taken in the order of sending, so that documents stay in theirs.
        batches = _batches(corpus.read(position=position))
        waiting: deque[tuple[list[tuple[Document, Any]], Callable[[], list[NDArray[Any]]]]] = (
            deque()
        )
        for batch in chain(batches, [None]):
            if batch is not None:
                waiting.append((batch, self._submit([document.text for document, _ in batch])))
            # At most three batches a process: reading never runs far ahead of encoding.
            while waiting and (batch is None or len(waiting) > 3 * self.processes):
                documents, result = waiting.popleft()
                for (document, after), tokens in zip(documents, result()):
                    yield Encoded(tokens, document.key, len(document.text.encode()), after)

    def _submit(self, texts: list[str]) -> Result:
        if self.pool is None:
            return lambda: encode_batch(self.tokenizer, self.dtype, texts)
        try:
            future = self.pool.submit(_encode_in_worker, texts)
        # The pool is lost with one process; what is finished is on the disk.
        except BrokenProcessPool as error:
            raise _died() from error

        def result() -> list[NDArray[Any]]:
            try:
                return future.result()
            except BrokenProcessPool as error:
                raise _died() from error

        return result


def _died() -> UserError:
    return UserError(
        "a process that encodes was killed, by the system where memory ran out; the finished "
        "shards are kept: give the same command again, with fewer --processes"
    )


def _batches(documents: Iterator[tuple[Document, Any]]) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for document, position in documents:
        batch.append((document, position))
        size += len(document.text)  # characters: near enough, and no encoding
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[Any], texts: list[str]
) -> list[NDArray[Any]]:
    """Each text's tokens, as training on the text itself would make them."""
    return [np.array(encode_document(tokenizer, text), dtype) for text in texts]


_worker: list[Any] = []  # in a worker: its tokenizer and dtype


def _start_worker(tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[Any]) -> None:
    follow_parent()
    _worker[:] = tokenizer, dtype


def _encode_in_worker(texts: list[str]) -> list[NDArray[Any]]:
    tokenizer, dtype = _worker
    return encode_batch(tokenizer, dtype, texts)
