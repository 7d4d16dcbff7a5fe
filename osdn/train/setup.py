"""From a recipe to its parts: text, model, device, and the finished model's directory."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from math import gcd
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from osdn.data import (
    Mixture,
    RankRows,
    Row,
    RowSource,
    WorkerRows,
    open_corpora,
    open_rows,
    validation_rows,
    vocabulary_size,
)
from osdn.data.documents import Corpus
from osdn.data.shards import tokenizer_fingerprint
from osdn.errors import UserError
from osdn.model.card import CARD, Training, is_ours, write_card
from osdn.model.configuration import OSDNConfig
from osdn.model.loading import let_read, without_bars
from osdn.model.modeling import OSDNForCausalLM
from osdn.system.files import TEMPORARY, sync
from osdn.train.blocks import prepare_blocks
from osdn.train.distributed.parallel import Parallel
from osdn.train.distributed.sharding import Sharded
from osdn.train.initial import Initializer, empty_model
from osdn.train.objective import Objective
from osdn.train.recipe import Data, Recipe


def make_device(name: str, option: str = "train.device") -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU.

    Args:
        option: where the user gave the name.
    """
    # Every wrong name is told here. Else it fails in the first tensor, with PyTorch's words.
    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{option}: expected auto, cpu or cuda, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"{option}: expected auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and not cuda:
        raise UserError(f"{option}: PyTorch finds no CUDA device here; choose cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"{option}: there is no {name}; CUDA devices here are numbered from 0 to "
            f"{torch.cuda.device_count() - 1}"
        )
    return device


def make_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> OSDNConfig:
    """The model's configuration, with what the tokenizer and the rows decide.

    Raises:
        UserError: the embedding has fewer rows than the tokenizer has tokens, or the two do not
            fit otherwise.
    """
    tokens = vocabulary_size(tokenizer)  # with special tokens
    # What the recipe may leave out, since the tokenizer and the rows fix it.
    known = {
        "vocab_size": tokens,
        "max_position_embeddings": recipe.train.seq_len,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # The recipe has the last word: an embedding may be larger than the vocabulary.
    fields = {**known, **recipe.model}
    if fields["vocab_size"] < tokens:
        raise UserError(
            f"model.vocab_size: {fields['vocab_size']} is too small for the {tokens} "
            f"tokens of data.tokenizer {recipe.data.tokenizer!r}; raise it, or leave it out"
        )
    try:
        return OSDNConfig(**fields)
    except ValueError as error:
        raise UserError(f"model: {error}") from error


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> OSDNForCausalLM:
    """The model on the CPU with its initial weights, which train.seed decides.

    Raises:
        UserError: as make_config.
    """
    model = empty_model(make_config(recipe, tokenizer))
    Initializer(model, seed=recipe.train.seed, device=torch.device("cpu")).fill(model)
    return model


def make_sharded(recipe: Recipe, config: OSDNConfig, parallel: Parallel) -> Sharded:
    """The model in training, this process's share of it, with its initial weights."""
    options = recipe.train
    # Without values: they are drawn block by block, so that no process holds more than its share.
    bfloat16 = options.precision == "bfloat16"
    model = empty_model(config)
    prepare_blocks(model, checkpointing=options.activation_checkpointing, compile=options.compile)
    objective = Objective(model, autocast=bfloat16 and parallel.shard == 1, z_loss=options.z_loss)
    initializer = Initializer(model, seed=options.seed, device=parallel.device)
    return Sharded(objective, initializer, parallel, bfloat16=bfloat16)


def passes(recipe: Recipe, processes: int) -> int:
    """Forward passes of each process in a step.

    Raises:
        UserError: train.batch_rows cannot be divided among them.
    """
    # An exact number of passes: a smaller last one would change the mean over targets.
    rows, batch = recipe.train.rows, recipe.train.batch_rows
    if batch % (rows * processes):
        once = rows * processes
        # Two ways out, worked out for the user: another batch, or other passes of the same.
        share = gcd(rows, batch // processes) if batch % processes == 0 else 0
        advice = f"set train.batch_rows={-(-batch // once) * once}"
        if share:
            advice += f", or train.rows={share}, which changes only the speed"
        raise UserError(
            f"train.batch_rows: {batch} is no multiple of the {once} rows of a forward pass "
            f"(train.rows={rows} in each of {processes} processes); {advice}"
        )
    return batch // (rows * processes)


def open_data(data: Data) -> tuple[Corpus | Mixture, Corpus | Mixture]:
    """The corpus of the training and that of the validation: the same where a share is held out.

    Raises:
        UserError: see open_corpus; it names the field.
    """

    def named(names: str | list[str] | dict[str, float], split: str) -> Corpus | Mixture:
        return open_corpora(
            names,
            text_field=data.text_field,
            separator=data.separator,
            subset=data.subset,
            split=split,
        )

    # One object for both: the split by content makes it two texts that never meet.
    corpus = named(data.corpus, data.split)
    if not isinstance(data.validation, str):
        return corpus, corpus
    with _naming_validation(data):
        return corpus, named(data.validation, "validation")


@contextmanager
def _naming_validation(data: Data) -> Iterator[None]:
    """Errors of a validation corpus of its own, which name the field of most corpora, renamed."""
    try:
        yield
    except UserError as error:
        if not isinstance(data.validation, str):
            raise
        raise UserError(str(error).replace("data.corpus", "data.validation", 1)) from error


class RunData(NamedTuple):
    """A process's training rows, and the validation.

    rows: of training.  validation: rows.  validation_bytes: UTF-8 bytes of their text.
    read: what check_read compares, fingerprints of what the rows' own state does not know.
    corpus: digest of the training data, as the model card gives it.
    """

    rows: RankRows | WorkerRows
    validation: list[Row]
    validation_bytes: int
    read: dict[str, str]
    corpus: str


def make_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, rank: int = 0, world: int = 1
) -> RunData:
    """What a process of a run reads.

    Raises:
        UserError: see open_corpora; it names the field.
    """
    data, length = recipe.data, recipe.train.seq_len
    corpus, other = open_data(data)
    # A corpus of its own is read whole for validation, and holds nothing out of the other.
    held_out = 0.0 if isinstance(data.validation, str) else data.validation
    fraction = 1.0 if isinstance(data.validation, str) else data.validation
    # Read once, at the start: every validation scores the same rows.
    validation, size = list[Row](), 0
    with _naming_validation(data):
        if fraction:
            validation, size = validation_rows(
                other, tokenizer, length=length, fraction=fraction, limit=data.validation_bytes
            )
    # The order of rows depends on these alone: neither on processes nor on workers.
    source = RowSource(
        corpus=corpus,
        tokenizer=tokenizer,
        length=length,
        fraction=held_out,
        shuffle_bytes=data.shuffle_bytes,
        seed=recipe.train.seed,
        lanes=data.lanes,
    )
    rows = open_rows(source, rank=rank, world=world, workers=data.workers)
    # A name can stay while what is behind it changes: fingerprints go into the checkpoint.
    read = {"data.tokenizer": tokenizer_fingerprint(tokenizer)}
    if isinstance(data.validation, str):
        read["data.validation"] = other.fingerprint
    digest = blake2b(corpus.fingerprint.encode(), digest_size=16).hexdigest()
    return RunData(rows, validation, size, read, digest)


def check_read(saved: dict[str, str], now: dict[str, str]) -> None:
    """That a run goes on with the tokenizer and validation text that its checkpoint had.

    Args:
        saved: of the checkpoint; empty in those of earlier versions, which are believed.
        now: what make_rows gives.

    Raises:
        UserError: one has changed behind its name.
    """
    changed = {
        "data.tokenizer": "it gives other tokens than it did when",
        "data.validation": "its files changed (names or sizes) since",
    }
    for field, fingerprint in now.items():  # absent in the checkpoints of earlier versions
        if saved.get(field, fingerprint) != fingerprint:
            raise UserError(
                f"{field}: {changed[field]} the checkpoint was saved; restore what was there, or "
                "start a run in a new directory"
            )


def export(
    out: Path, sharded: Sharded, tokenizer: PreTrainedTokenizerBase, training: Training
) -> None:
    """Write out/model, which AutoModelForCausalLM and AutoTokenizer load; whole or not at all.

    Its card tells of the training; a card that the user wrote there is kept. The parameters are
    gathered one by one to the CPU of rank 0, which alone writes.
    """
    # Collective, so all processes go through it, though one of them writes.
    whole = dict(sharded.whole_parameters())
    sharded.parallel.from_main(
        lambda: _write_model(out, sharded.model.config, whole, tokenizer, training)
    )


def _write_model(
    out: Path,
    config: OSDNConfig,
    parameters: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    training: Training,
) -> None:
    # assign=True: the gathered tensors become the parameters, without a second copy.
    model = empty_model(config)
    model.load_state_dict(parameters, strict=False, assign=True)  # tied ones have one name here
    model.tie_weights()
    # Beside its place first: whoever loads out/model finds all of it or nothing.
    target, unfinished = out / "model", out / f"{TEMPORARY}model"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with without_bars():
            model.save_pretrained(unfinished)
            let_read(unfinished)
            tokenizer.save_pretrained(unfinished)
        if is_ours(target / CARD):
            write_card(unfinished, model, training)
        else:
            shutil.copy2(target / CARD, unfinished / CARD)
        # On the disk before the name: after a power cut the name must not hold empty files.
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
            "command again, which resumes from the newest checkpoint"
        ) from error
