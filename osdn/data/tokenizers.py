"""Tokenizers: one built in that knows bytes, or any that Hugging Face can load without code."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from osdn.errors import UserError
from osdn.system.hub import hub_is_reachable

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that a recipe names: "byte", a directory, or a Hugging Face name.

    Raises:
        UserError: nothing of that name, no network, or no end-of-text token to divide documents.
    """
    if name == "byte":
        return byte_tokenizer()
    local = Path(name).is_dir()
    tokenizer: PreTrainedTokenizerBase
    try:  # what lies on this machine needs no network
        tokenizer = AutoTokenizer.from_pretrained(
            name, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        if local:
            raise UserError(f"data.tokenizer: {name} holds no tokenizer: {_line(error)}") from error
        tokenizer = _download(name)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"data.tokenizer: {name!r} has no end-of-text token (eos_token) to divide documents; "
            "choose another, or 'byte'"
        )
    return tokenizer


def _download(name: str) -> PreTrainedTokenizerBase:
    if not hub_is_reachable():
        raise UserError(
            f"data.tokenizer: {name!r} is no directory here and is not in the local cache, and "
            "there is no network to fetch it; connect, give a directory, or use 'byte'"
        )
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"data.tokenizer: cannot load {name!r}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte b of the UTF-8 text is token b; 256 ends (and begins) a text, 257 pads. 258 tokens.

    A byte-level BPE without a merge, so that any `AutoTokenizer` loads it once it is saved and
    `decode` gives back every text exactly.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # No regular expression: it would cut the text into words, and there is nothing to merge.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2, 2019)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(0x100)]


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs: 1 more than the largest id, as ids may have holes."""
    # Not len(): added tokens may lie above a hole.
    return max(tokenizer.get_vocab().values()) + 1


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text's tokens between a begin and an end token, so that all of the text is predicted.

    A tokenizer without a begin token gets its end token there. Special tokens spelt out in the
    text are text.
    """
    # verbose=False: it warns of a length, which no limit of ours.
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [eos if bos is None else bos, *ids, eos]
