"""The split into training and held-out documents, and the shuffled order of the former."""

from collections.abc import Generator, Iterator
from random import Random
from typing import Any

from osdn.data.documents import EMPTY_EPOCHS, WHOLE, BlockPlace, Corpus, Document, Share, checked
from osdn.errors import UserError


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document is for validation: its content's hash decides, so copies stay together."""
    # Python compares an int with a float exactly, without rounding the int.
    return document.key < fraction * 2**64


def held_out_texts(corpus: Corpus, *, fraction: float, limit: int) -> list[str]:
    """The first held-out texts of the corpus, cut after `limit` bytes of UTF-8 in all.

    Files are read in a fixed random order, so that the texts are no more alike than any others.

    Raises:
        UserError: no document is held out.
    """
    texts: list[str] = []
    left = limit
    # One order for all seeds, so that runs can be compared.
    for document, _ in corpus.read(order="validation"):
        if is_held_out(document, fraction):
            # Cut in bytes, the measure's unit; half a character at the end is dropped.
            text = document.text.encode()[:left].decode(errors="ignore")
            left -= len(text.encode())
            texts.append(text)
            if left < 4:  # less than any character may need
                break
    if not any(texts):
        raise UserError(
            f"data.validation: no document falls in the held-out {fraction:.2%} of the corpus; "
            "raise the fraction, name a corpus of its own, divide text files into documents "
            "(data.separator), or set 0 for no validation"
        )
    return texts


class TrainingDocuments:
    """The training documents for ever, epoch after epoch, each block of them shuffled.

    A block is as many documents as reach `shuffle_bytes`; it is what is held in memory. Files
    come in another order each epoch. The state is where the block began and how many of its
    documents are done, so it is small, and restoring it reads one block again.

    Args:
        corpus: where the documents come from.
        fraction: share of held-out documents, which are passed over.
        shuffle_bytes: size of a block, UTF-8 bytes.
        seed: of the order.
        share: the part of the corpus to read; the parts of one epoch make up the whole.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        fraction: float,
        shuffle_bytes: int,
        seed: int,
        share: Share = WHOLE,
    ) -> None:
        self.corpus, self.fraction, self.share = corpus, fraction, share
        self.shuffle_bytes, self.seed = shuffle_bytes, seed
        self.state: dict[str, Any] = {"epoch": 0, "block": 0, "position": None, "done": 0}
        self._documents = self._read()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._documents)

    def state_dict(self) -> dict[str, Any]:
        """Where the next document is: plain numbers and strings."""
        return {"fingerprint": self.corpus.fingerprint, **self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called.

        Raises:
            UserError: the corpus is not the one that the state belongs to.
        """
        state = dict(checked(BlockPlace, state))
        if state.pop("fingerprint") != self.corpus.fingerprint:
            raise UserError(
                "data.corpus: its files changed (names or sizes) since the checkpoint was saved; "
                "restore them, or start a run in a new directory"
            )
        # The old generator holds a file open.
        self._documents.close()
        self.state = state
        self._documents = self._read()

    def close(self) -> None:
        """Let go of open files."""
        self._documents.close()

    def _read(self) -> Generator[str, None, None]:
        state, share = self.state, self.share
        # Parts shuffle their blocks differently. Whole corpora keep the order of earlier versions.
        suffix = f"-{share.part}" if share.of > 1 else ""
        empty = 0
        while True:  # epoch by epoch
            source = self.corpus.read(
                order=f"{self.seed}-{state['epoch']}", position=state["position"], share=share
            )
            after, found = state["position"], state["block"] > 0
            while True:
                # Read whole, then shuffled: the block is the window of the shuffle.
                block, after = self._block(source, after)
                if not block:
                    break
                found = True
                order = f"{self.seed}-{state['epoch']}-{state['block']}{suffix}"
                Random(order).shuffle(block)
                # a resumed block is read again, and its first texts passed over
                for text in block[state["done"] :]:
                    # Before the yield: the state counts what was handed out.
                    state["done"] += 1
                    yield text
                # Only now does the position move: until then resumption reads this block again.
                state.update(block=state["block"] + 1, position=after, done=0)
            # A share may have no training document in one epoch, since its files change with it.
            empty = 0 if found else empty + 1
            if empty == EMPTY_EPOCHS:
                fewer = ", or lower data.lanes" if share.of > 1 else ""
                part = f" (part {share.part + 1} of {share.of})" if share.of > 1 else ""
                raise UserError(
                    f"data.corpus: no training document in it{part}; give more text or hold out "
                    f"less (data.validation){fewer}"
                )
            state.update(epoch=state["epoch"] + 1, block=0, position=None, done=0)

    def _block(self, source: Iterator[tuple[Document, Any]], after: Any) -> tuple[list[str], Any]:
        """The next block's texts and the position behind them."""
        block: list[str] = []
        size = 0
        for document, position in source:
            after = position
            # Passed over after reading: only the content tells its side.
            if not is_held_out(document, self.fraction):
                block.append(document.text)
                size += len(document.text.encode())  # bytes, as data.shuffle_bytes is
                if size >= self.shuffle_bytes:
                    break
        return block, after
