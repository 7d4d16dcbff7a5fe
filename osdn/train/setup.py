"""From a recipe to its parts: text, model, device, and the finished model's directory."""

import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from osdn.data import (
    Row,
    TrainingDocuments,
    TrainingRows,
    encode_document,
    held_out_texts,
    open_corpus,
    pack,
)
from osdn.data.corpora import Corpus
from osdn.errors import UserError
from osdn.model.configuration import OSDNConfig
from osdn.model.modeling import OSDNForCausalLM
from osdn.train.checkpoint import TEMPORARY, sync
from osdn.train.config import Data, Recipe


def make_device(name: str) -> torch.device:
    """The device that a recipe names; "auto" is CUDA where there is one, else the CPU."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"train.device: expected auto, cpu or cuda, got {name!r}") from error
    if device.type == "cuda" and not cuda:
        raise UserError(
            "train.device: PyTorch finds no CUDA device here; set train.device=cpu or auto"
        )
    return device


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> OSDNForCausalLM:
    """The model with its initial weights, which train.seed decides.

    Raises:
        UserError: the embedding has fewer rows than the tokenizer has tokens, or the two do not
            fit otherwise.
    """
    known = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": recipe.train.seq_len,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    fields = {**known, **recipe.model}
    if fields["vocab_size"] < len(tokenizer):
        raise UserError(
            f"model.vocab_size: {fields['vocab_size']} is too small for the {len(tokenizer)} "
            f"tokens of data.tokenizer {recipe.data.tokenizer!r}; raise it, or leave it out"
        )
    try:
        config = OSDNConfig(**fields)
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    torch.manual_seed(recipe.train.seed)
    return OSDNForCausalLM(config)


def _corpus(data: Data, names: str | list[str], split: str) -> Corpus:
    return open_corpus(
        names,
        text_field=data.text_field,
        separator=data.separator,
        subset=data.subset,
        split=split,
    )


def make_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[TrainingRows, list[Row], int]:
    """The training rows; the validation rows, and the bytes of text that they hold."""
    data, length = recipe.data, recipe.train.seq_len
    corpus = _corpus(data, data.corpus, data.split)
    if isinstance(data.validation, str):
        held_out, fraction = 0.0, 1.0
        other = _corpus(data, data.validation, "validation")
    else:
        held_out = fraction = data.validation
        other = corpus
    texts = (
        held_out_texts(other, fraction=fraction, limit=data.validation_bytes) if fraction else []
    )
    documents = TrainingDocuments(
        corpus, fraction=held_out, shuffle_bytes=data.shuffle_bytes, seed=recipe.train.seed
    )
    validation = list(pack((encode_document(tokenizer, text) for text in texts), length))
    size = sum(len(text.encode()) for text in texts)
    return TrainingRows(documents, tokenizer, length), validation, size


def export(out: Path, model: OSDNForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write out/model, which AutoModelForCausalLM and AutoTokenizer load; whole or not at all."""
    target, unfinished = out / "model", out / f"{TEMPORARY}model"
    shutil.rmtree(unfinished, ignore_errors=True)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        for path in (*unfinished.iterdir(), unfinished):
            sync(path)
        if target.exists():  # of a run whose last checkpoint was damaged
            shutil.rmtree(target)
        os.rename(unfinished, target)
        sync(out)
    except Exception as error:  # the writers of weights and tokenizers have errors of their own
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(
            f"{target}: cannot write the finished model: {error}; make room and give the same "
            "command again, which goes on from the newest checkpoint there is"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    return target
