"""The third part of `osdn demo`: a tokenizer and a model of the recipe's text, from nothing."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from osdn.cli.generate import load
from osdn.data import open_corpus
from osdn.errors import UserError
from osdn.train import TrainResult, load_recipe, train
from osdn.train.recipe import Recipe

VOCABULARY = 1024
SAMPLE = 8_000_000  # UTF-8 bytes of text that the tokenizer is learned from
END = "<|end|>"
PROMPT = "def "
PASSAGE_TOKENS = 160


class Written(NamedTuple):
    """A trained model, how long that took on this machine, and what it writes after PROMPT."""

    result: TrainResult
    minutes: float
    passage: str


def read_recipe(path: Path, overrides: list[str]) -> Recipe:
    """The recipe; held-out text is needed, for the model to be measured.

    Raises:
        UserError: from the recipe, or it holds nothing out.
    """
    recipe = load_recipe(path, overrides)
    if recipe.data.validation == 0:
        raise UserError("data.validation: the demo needs held-out text, so give it a share")
    return recipe


def write(recipe: Recipe, out: Path) -> Written:
    """Learn a small tokenizer if the recipe's is bytes, train the model, sample a passage."""
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
        top_k=0,  # from all tokens; transformers' default is the 50 likeliest
        pad_token_id=tokenizer.eos_token_id,
    )
    return Written(result, minutes, tokenizer.decode(made[0], skip_special_tokens=True))


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
    data, size = recipe.data, 0
    corpus = open_corpus(
        data.corpus,
        text_field=data.text_field,
        separator=data.separator,
        subset=data.subset,
        split=data.split,
    )
    for document, _ in corpus.read():
        yield document.text
        size += len(document.text)
        if size > SAMPLE:
            return
