"""Megatron's tokenized files, NAME.bin and NAME.idx, read as shards.

    NAME.idx   "MMIDIDX\\0\\0", version uint64 = 1, type of a token uint8 (TYPES),
               sequences S uint64, entries of the document index D uint64,
               tokens of each sequence [S] int32, its first byte in NAME.bin [S] int64,
               the first sequence of each document, and S at the end [D] int64
    NAME.bin   the sequences' tokens end to end

All numbers are little-endian. The format is that of Megatron-LM's
megatron/core/datasets/indexed_dataset.py. A file is cut into shards of at most DOCUMENTS documents,
so that opening one reads a part of the index and the shuffled order fits into memory.

The files hold no text, no tokenizer and no keys. So a document is held out by a hash of its tokens,
its bytes are those of the decoded text, and of the tokenizer only the vocabulary is compared.
"""

import struct
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from osdn.data.files import expand
from osdn.data.token_corpus import ENTRY, TokenCorpus
from osdn.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
DOCUMENTS = 1 << 20  # of a shard
HASHED = 32  # tokens of a document's start, and its length, that decide its side of the split
SUFFIXES = (".bin", ".idx")


class MegatronShard(NamedTuple):
    """Documents first..last of a file; file is its number in the corpus."""

    name: str
    file: int
    first: int
    last: int


class MegatronFile:
    """One pair of files, its header and sizes checked.

    Raises:
        UserError: damaged, or not of this format.
    """

    def __init__(self, index: Path) -> None:
        self.index, self.tokens = index, index.with_suffix(".bin")
        try:
            self.size = self.tokens.stat().st_size
            with index.open("rb") as file:
                header = file.read(HEADER.size)
            size = index.stat().st_size
        except OSError as error:
            raise UserError(
                f"data.corpus: cannot read {error.filename}: {error.strerror}; a Megatron corpus "
                "is a pair NAME.bin and NAME.idx"
            ) from error
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise _damaged(index, "does not begin as a Megatron index does (MMIDIDX)")
        _, version, code, self.sequences, entries = HEADER.unpack(header)
        if version != 1 or code not in TYPES:
            raise _damaged(
                index, f"expected version 1 and a type of {sorted(TYPES)}, got {version}, {code}"
            )
        self.dtype = np.dtype(TYPES[code])
        # A sequence's mode, one byte, may follow: Megatron's multimodal files have it.
        plain = HEADER.size + 12 * self.sequences + 8 * entries
        if size not in (plain, plain + self.sequences):
            raise _damaged(index, f"has {size:,} bytes, expected {plain:,} by its header")
        if entries < 2 or self.sequences < 1:
            raise _damaged(index, "holds no document")
        self.documents = entries - 1
        self.fingerprint = [index.stem, size, self.size, header.hex()]

    def shards(self, number: int) -> list[MegatronShard]:
        """The file's shards; number: of the file in its corpus."""
        starts = range(0, self.documents, DOCUMENTS)
        return [
            MegatronShard(
                f"{number}-{self.index.stem}-{first}",
                number,
                first,
                min(first + DOCUMENTS, self.documents),
            )
            for first in starts
        ]

    def read(self, first: int, last: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """(tokens of documents first..last, mapped; the number of tokens of each).

        Raises:
            UserError: the index is damaged there.
        """
        lengths, pointers, starts = self._arrays()
        documents = np.array(starts[first : last + 1])
        # Compared and not subtracted: differences of damaged numbers wrap around.
        rising = (documents[1:] >= documents[:-1]).all()
        if not rising or documents[0] < 0 or documents[-1] > self.sequences:
            raise _damaged(self.index, "its documents' sequences are out of order")
        begin, end = int(documents[0]), int(documents[-1])
        own = lengths[begin:end].astype(np.int64)
        ends = np.cumsum(own)  # [sequences], in tokens
        if (own < 0).any() or not own.any():
            raise _damaged(self.index, f"documents {first} to {last - 1} hold no token")
        at = int(pointers[begin])
        expected = at + (ends - own) * self.dtype.itemsize
        if at < 0 or at % self.dtype.itemsize or (pointers[begin:end] != expected).any():
            raise _damaged(self.index, "its sequences do not lie end to end")
        count = int(ends[-1])
        if at + count * self.dtype.itemsize > self.size:
            raise _damaged(self.tokens, f"has {self.size:,} bytes, fewer than its index needs")
        sizes = np.diff(np.concatenate([[0], ends])[documents - begin])
        return np.memmap(self.tokens, self.dtype, "r", at, (count,)), sizes

    def _arrays(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Lengths, pointers, and documents' first sequences, mapped into memory."""
        entries = self.documents + 1
        at = HEADER.size
        lengths = np.memmap(self.index, "<i4", "r", at, (self.sequences,))
        at += lengths.nbytes
        pointers = np.memmap(self.index, "<i8", "r", at, (self.sequences,))
        starts = np.memmap(self.index, "<i8", "r", at + pointers.nbytes, (entries,))
        return lengths, pointers, starts


class MegatronCorpus(TokenCorpus[MegatronShard]):
    """The documents of some pairs of files; documents without a token are passed over.

    Raises:
        UserError: a pair is damaged or incomplete.
    """

    def __init__(self, indices: Sequence[Path]) -> None:
        more = f" and {len(indices) - 1} more" if len(indices) > 1 else ""
        super().__init__(f"{indices[0]}{more}")
        self.files = [MegatronFile(index) for index in indices]
        self.shards = [shard for i, file in enumerate(self.files) for shard in file.shards(i)]
        listing = repr([file.fingerprint for file in self.files]).encode()
        self.fingerprint = blake2b(listing, digest_size=16).hexdigest()
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Remember it; tokens outside of its vocabulary are refused when a shard is opened."""
        super().check_tokenizer(tokenizer)
        self.tokenizer = tokenizer

    def open(self, shard: MegatronShard) -> tuple[NDArray[Any], NDArray[Any]]:
        """As TokenCorpus.open; the index's bytes are 0, since they are not known."""
        file = self.files[shard.file]
        try:
            tokens, sizes = file.read(shard.first, shard.last)
        except (OSError, ValueError) as error:
            raise _damaged(file.index, f"cannot be read: {error}") from error
        if reason := self.outside_vocabulary(shard.name, tokens):
            raise _damaged(file.tokens, reason)
        index = np.zeros(int((sizes > 0).sum()), ENTRY)
        index["tokens"] = sizes[sizes > 0]
        index["key"] = keys(tokens, index["tokens"])
        return tokens, index

    def document(self, tokens: NDArray[Any]) -> NDArray[Any]:
        """Between a begin and an end token, which Megatron's tools may have left out."""
        assert self.tokenizer is not None
        end = self.tokenizer.eos_token_id
        begin = end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        before = [] if tokens[0] == begin else [begin]
        after = [] if tokens[-1] == end and len(tokens) + len(before) > 1 else [end]
        return np.concatenate([before, tokens, after]).astype(np.int64)

    def text_bytes(self, tokens: NDArray[Any], entry: Any) -> int:
        """Of the decoded text."""
        assert self.tokenizer is not None
        text = self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        assert isinstance(text, str)
        return len(text.encode())


def keys(tokens: NDArray[Any], sizes: NDArray[Any]) -> NDArray[np.uint64]:
    """64 bits for each document by its length and its first HASHED tokens: equal for copies.

    tokens: [N], of all documents end to end.  sizes: [documents], tokens of each, at least 1.
    The mixing is splitmix64's (Steele et al. 2014), one round a token.
    """
    sizes = sizes.astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    found = _mixed(sizes.astype(np.uint64))
    for i in range(HASHED):
        there = sizes > i
        if not there.any():
            break
        token = tokens[starts[there] + i].astype(np.int64).astype(np.uint64)
        found[there] = _mixed(found[there] ^ token)
    return found


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's output function; products wrap at 64 bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def open_megatron(names: Sequence[str]) -> MegatronCorpus:
    """The pairs that paths and globs of .bin or .idx files name.

    Raises:
        UserError: nothing there, other files among them, or a damaged pair.
    """
    files = [Path(file.name) for file in expand(names)]
    for path in files:
        if path.suffix not in SUFFIXES:
            raise UserError(f"data.corpus: {path}: expected Megatron's .bin and .idx files only")
    return MegatronCorpus(list(dict.fromkeys(path.with_suffix(".idx") for path in files)))


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"data.corpus: damaged Megatron file: {path} {reason}; copy both files again, or "
        "tokenize again"
    )
