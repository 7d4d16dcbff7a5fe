"""A pre-tokenized corpus: shards of tokens that are mapped into memory, as `osdn tokenize` writes.

    manifest.json          what made it, and each shard's name, counts and SHA-256
    shard_00000.tokens     the documents' tokens end to end, uint16 or uint32 by the vocabulary
    shard_00000.index      for every document (ENTRY): key, tokens, bytes
    shard_00000.json       the shard's line of the manifest, and where the source goes on after it
    shards_job.json        what is being made, so that it can be gone on with

A document is a begin token, its tokens and an end token; its key and its UTF-8 bytes are those of
its text, so that the split into training and held-out documents is the same as from the text.
All numbers are little-endian.
"""

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from osdn.data.token_corpus import ENTRY, TokenCorpus
from osdn.errors import UserError
from osdn.system.files import sha256
from osdn.system.outside import Malformed, Outside, read_json, shown
from osdn.system.retry import persevere

MANIFEST, JOB = "manifest.json", "shards_job.json"
KIND = "osdn-shards-1"
REPAIR = "copy it again, or give the osdn tokenize command again, which makes it anew"
# accents, digits, spaces, code, CJK, an emoji: where tokenizers with equal words differ
PROBE = "  Über 12,345 größen — naïve café\n\tdef f(x): return x**2  # 日本語 🙂 don't"


class Shard(Outside):
    """One shard as the manifest has it; sha256 holds the digests of its two files."""

    name: str = Field(pattern=r"^shard_[0-9]{5,9}$")  # a file name: nothing outside the directory
    documents: int = Field(ge=1)
    tokens: int = Field(ge=2)
    bytes: int = Field(ge=0)
    sha256: list[str] = Field(min_length=2, max_length=2)


class Maker(Outside):
    """The tokenizer that made the shards: its name in a recipe, fingerprint and `len`."""

    name: str
    fingerprint: str
    size: int


class Kind(Outside):
    """What is read of a manifest first, since another kind may have other fields."""

    kind: str


class Manifest(Kind):
    """manifest.json."""

    tokenizer: Maker
    dtype: Literal["<u2", "<u4"]
    shard_tokens: int
    documents: int
    tokens: int
    bytes: int
    shards: list[Shard] = Field(min_length=1)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokens mean: the vocabulary, its begin and end, and how a probe is cut."""
    # The vocabulary alone is not enough: normalizers and pre-tokenizers change the cut.
    probe = tokenizer.encode(PROBE, add_special_tokens=False, verbose=False)
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    meaning = repr([sorted(tokenizer.get_vocab().items()), ends, probe])
    return blake2b(meaning.encode(), digest_size=16).hexdigest()


def shard_files(directory: Path, shard: Shard, dtype: np.dtype[Any]) -> list[tuple[Path, int]]:
    """The shard's two files, tokens first, and the bytes that each must have."""
    sizes = shard.tokens * dtype.itemsize, shard.documents * ENTRY.itemsize
    names = f"{shard.name}.tokens", f"{shard.name}.index"
    return [(directory / name, size) for name, size in zip(names, sizes)]


def open_shards(directory: Path) -> "ShardCorpus":
    """The shards of a directory where `osdn tokenize` has been.

    Raises:
        UserError: it has not been, or has not finished, or a shard is damaged.
    """
    if not (directory / JOB).is_file():
        raise UserError(f"{directory} holds no shards; osdn tokenize makes them")
    if not (directory / MANIFEST).is_file():
        raise UserError(
            f"data.corpus: {directory} is not finished; give the osdn tokenize command that began "
            "it once more, which finishes it"
        )
    return ShardCorpus(directory)


class ShardCorpus(TokenCorpus[Shard]):
    """The shards of a directory; every file's size is compared with the manifest at once.

    Raises:
        UserError: a damaged manifest or shard, named.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(str(directory))
        self.directory = directory
        path = directory / MANIFEST
        try:
            # The kind first: a later version's manifest must be told as that, not as damage.
            kind = read_json(path, Kind, REPAIR).kind
            if kind != KIND:
                raise UserError(
                    f"data.corpus: {path}: expected {KIND}, found {shown(kind)}; "
                    "tokenize again with this version's osdn tokenize"
                )
            self.manifest = read_json(path, Manifest, REPAIR)
        except OSError as error:
            raise UserError(f"data.corpus: cannot read {path}: {error.strerror}") from error
        except Malformed as error:
            raise UserError(f"data.corpus: damaged manifest: {error}") from error
        self.shards = self.manifest.shards
        self.dtype = np.dtype(self.manifest.dtype)
        # Sizes now, in a millisecond each. Digests take as long as reading it all: `check`.
        for shard in self.shards:
            self._check_sizes(shard)
        # From the manifest's digests: the fingerprint changes with every byte of the shards.
        digests = [self.manifest.tokenizer.fingerprint, *(s.sha256 for s in self.shards)]
        self.fingerprint = blake2b(repr(digests).encode(), digest_size=16).hexdigest()

    def files(self, shard: Shard) -> list[tuple[Path, int]]:
        """The shard's two files, tokens first, and the bytes that each must have."""
        return shard_files(self.directory, shard, self.dtype)

    def _check_sizes(self, shard: Shard) -> None:
        for path, size in self.files(shard):
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found:,} bytes"
                raise _damaged(path, f"{state}, expected {size:,}")

    def check(self) -> Iterator[Shard]:
        """Compare every file's SHA-256; yields each shard that is sound.

        Raises:
            UserError: one is not, named.
        """
        for shard in self.shards:
            for (path, _), expected in zip(self.files(shard), shard.sha256):  # tokens, index
                if sha256(path) != expected:
                    raise _damaged(path, "its SHA-256 is not the manifest's")
            yield shard

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer that is not the one of these tokens."""
        made = self.manifest.tokenizer
        # By what it does, not by its name: a tokenizer that was moved is still the same.
        if tokenizer_fingerprint(tokenizer) != made.fingerprint:
            raise UserError(
                f"data.tokenizer: {self.directory} was tokenized with {made.name!r} "
                f"({made.size:,} tokens), and this is another ({len(tokenizer):,} tokens); set "
                f"data.tokenizer={made.name}, or run osdn tokenize with this one into another "
                "directory"
            )
        super().check_tokenizer(tokenizer)

    def open(self, shard: Shard) -> tuple[NDArray[Any], NDArray[Any]]:
        """(tokens, mapped into memory; the index, an array of ENTRY)."""
        tokens, index = (path for path, _ in self.files(shard))

        def read() -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
            yield (
                # Mapped: processes of one machine share its pages, and opening it costs nothing.
                np.memmap(tokens, self.dtype, "r", shape=(shard.tokens,)),
                np.fromfile(index, ENTRY),
            )

        try:
            mapped, entries = next(persevere(read, lambda: str(tokens)))
        except ValueError as error:
            raise _damaged(tokens, f"cannot be mapped: {error}") from error
        if len(entries) != shard.documents or int(entries["tokens"].sum()) != shard.tokens:
            raise _damaged(index, "its documents do not add up to its tokens")
        # Offsets come from this column, so what it says is added up before it is used.
        if entries["tokens"].min() < 2:  # each has a begin and an end token
            raise _damaged(index, "has a document without tokens")
        if reason := self.outside_vocabulary(shard.name, mapped):
            raise _damaged(tokens, reason)
        return mapped, entries


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"data.corpus: damaged shard: {path} {reason}; {REPAIR}")
