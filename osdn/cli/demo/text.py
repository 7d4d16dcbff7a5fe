"""The third part of `osdn demo`: a language model of Python's help pages, from nothing.

The recipe `tiny` is a model of bytes of the standard library's source. What it writes in two
minutes is noise to look at. The same model, with a vocabulary of two thousand word pieces and a
text of one kind, writes words.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from osdn.cli.generate import load
from osdn.data.mixture import parts_of
from osdn.errors import UserError
from osdn.train import TrainResult, load_recipe, train
from osdn.train.recipe import Recipe
from osdn.train.setup import open_data

VOCABULARY = 2048  # word pieces of the help pages: 3.6 bytes each, most words are one
SAMPLE = 8_000_000  # UTF-8 bytes of text that the tokenizer is learned from
END = "<|end|>"
PROMPT = "The"  # no space after it: the next piece brings its own
SIZES = [
    "train.steps=1500",
    "train.seq_len=256",
    "train.rows=4",
    "train.batch_rows=4",
    "train.optimizer.lr=5e-3",
]
PASSAGE_TOKENS = 160


class Written(NamedTuple):
    """A trained model, how long that took on this machine, and what it writes after PROMPT."""

    result: TrainResult
    minutes: float
    passage: str


def read_recipe(path: Path, overrides: list[str]) -> Recipe:
    """The recipe, `tiny` with SIZES; held-out text is needed, for the model to be measured.

    Raises:
        UserError: from the recipe, or it holds nothing out.
    """
    recipe = load_recipe(path, [*SIZES, *overrides] if path.stem == "tiny" else overrides)
    if recipe.data.validation == 0:
        raise UserError("data.validation: the demo needs held-out text, so give it a share")
    return recipe


def write(recipe: Recipe, out: Path) -> Written:
    """Train the model and sample a passage.

    A recipe's corpus "stdlib" becomes Python's help pages, a tokenizer "byte" one learned from the
    corpus; what else it names stays.
    """
    if recipe.data.corpus == "stdlib":
        data = recipe.data.model_copy(update={"corpus": str(write_help_pages(out))})
        recipe = recipe.model_copy(update={"data": data})
    if recipe.data.tokenizer == "byte":
        data = recipe.data.model_copy(update={"tokenizer": str(make_tokenizer(recipe, out))})
        recipe = recipe.model_copy(update={"data": data})
    began = time.monotonic()
    result = train(recipe, out / "language")
    minutes = (time.monotonic() - began) / 60
    model, tokenizer = load(result.out / "model")
    torch.manual_seed(recipe.train.seed)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids.long()
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=PASSAGE_TOKENS,
        do_sample=True,
        temperature=0.5,
        top_p=0.9,  # of what so small a model thinks unlikely, most is no word
        top_k=0,  # from all tokens; transformers' default is the 50 likeliest
        pad_token_id=tokenizer.eos_token_id,
    )
    return Written(result, minutes, tokenizer.decode(made[0], skip_special_tokens=True))


def write_help_pages(out: Path) -> Path:
    """A .jsonl file with the pages of Python's `help()`, 466 kB in Python 3.11; made once."""
    from pydoc_data.topics import topics

    path = out / "help.jsonl"
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": page}) + "\n" for page in topics.values()))
    return path


def make_tokenizer(recipe: Recipe, out: Path) -> Path:
    """The directory of a byte-level BPE tokenizer of the recipe's text; made once."""
    directory = out / "tokenizer"
    if (directory / "tokenizer_config.json").is_file():
        return directory
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(recipe), trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)
    whole.save_pretrained(directory)
    return directory


def _sample(recipe: Recipe) -> Iterator[str]:
    corpora = parts_of(open_data(recipe.data)[0])
    for corpus in corpora:
        size = 0
        for document, _ in corpus.read():
            yield document.text
            size += len(document.text)
            if size > SAMPLE // len(corpora):
                break
