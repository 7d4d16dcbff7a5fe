"""Models under evaluation: any causal language model of Hugging Face's, or ours."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging

from osdn.errors import UserError
from osdn.model.loading import fetch, load_weights
from osdn.train.setup import make_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LanguageModel:
    """A model, its tokenizer and what to call it.

    name: as the user gave it.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def limit(self) -> int | None:
        """Tokens that the model can take at most; None where there is no such limit (ours)."""
        # The configuration tells a trained length, and no layer of ours ends there.
        if self.model.config.model_type == "osdn":
            return None
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def trained_length(self) -> int:
        """Tokens of a training row, as far as the configuration tells."""
        return getattr(self.model.config, "max_position_embeddings", None) or 2048

    def describe(self) -> dict[str, Any]:
        """Name, class, parameters and precision, for a result."""
        config = self.model.config
        return {
            "name": self.name,
            "type": config.model_type,
            "mixer": getattr(config, "mixer", None),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "tokenizer": type(self.tokenizer).__name__,
            "vocabulary": len(self.tokenizer),
        }

    def encode(self, text: str) -> list[int]:
        """The text's tokens, none added, special tokens spelt out in it taken as text."""
        # As in training, where special tokens in a text are text.
        return self.tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    @property
    def start(self) -> list[int]:
        """The token that begins a document: bos, else eos, else none."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return [token]
        return []

    def check_length(self, tokens: int, name: str) -> None:
        """Raise UserError if the model cannot take a sequence of that many tokens."""
        if self.limit is not None and tokens > self.limit:
            raise UserError(
                f"{name}: needs {tokens} tokens, but {self.name} takes at most {self.limit}; "
                "choose a shorter window or context"
            )

    @torch.inference_mode()
    def continue_line(self, prompts: Sequence[list[int]], *, max_new_tokens: int = 48) -> list[str]:
        """The greedy continuation of every prompt, up to its first line break.

        The prompts are padded on the left, so that the answers are those of one at a time.
        """
        ids, mask = self._padded(prompts)  # [B, T]
        longest = ids.shape[1]
        self.check_length(longest + max_new_tokens, "the prompt and its answer")
        generate: Any = self.model.generate
        verbosity = logging.get_verbosity()
        if self.limit is None:  # transformers warns past the trained length, which is no limit here
            logging.set_verbosity_error()
        try:
            output = generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=self._pad,
                # Ends when every row has its line, not after as many tokens as there may be.
                stopping_criteria=StoppingCriteriaList([_LineBreak(self.tokenizer, longest)]),
            )
        finally:
            logging.set_verbosity(verbosity)
        # Without the prompts, which are all `longest` tokens.
        texts = self.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        return [text.partition("\n")[0] for text in texts]

    @torch.inference_mode()
    def nats(self, sequences: Sequence[list[int]], starts: Sequence[int]) -> list[float]:
        """−Σ_{t ≥ start} log p(token t | the tokens before it) of every sequence; start ≥ 1.

        The sequences are padded on the left, so that the figures are those of one at a time.
        """
        ids, mask = self._padded(sequences)  # [B, T]
        self.check_length(ids.shape[1], "the prompt and its answer")
        sizes = [len(tokens) - start for tokens, start in zip(sequences, starts, strict=True)]
        longest = max(sizes)
        # Models differ in what they take. Positions matter where padding would count as tokens.
        known = inspect.signature(self.model.forward).parameters
        options: dict[str, Any] = {}
        if "position_ids" in known:
            # [B, T], real tokens from 0
            options["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        if "logits_to_keep" in known:
            # One more than is scored: the last token's logits predict nothing here.
            options["logits_to_keep"] = longest + 1
        logits = self.model(ids, attention_mask=mask, use_cache=False, **options).logits
        # [B, longest, vocabulary], [B, longest]
        logits, expected = logits[:, -longest - 1 : -1].float(), ids[:, -longest:]
        losses = cross_entropy(logits.transpose(1, 2), expected, reduction="none")  # [B, longest]
        # Each row's own part; rows end together.
        return [
            float(row[longest - size :].sum()) for row, size in zip(losses.cpu().double(), sizes)
        ]

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else (self.start or [0])[0])

    def _padded(self, sequences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """(tokens [B, T] padded on the left, mask [B, T] of 0 and 1), on the model's device."""
        longest, device = max(map(len, sequences)), self.model.device
        rows = [[self._pad] * (longest - len(ids)) + list(ids) for ids in sequences]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences]
        return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


class _LineBreak(StoppingCriteria):
    """A row is done when what it has generated holds a line break."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: int):
        self.tokenizer, self.prompt = tokenizer, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        # All that was generated, since a line break may be part of any token.
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt :])
        return torch.tensor(["\n" in text for text in texts], device=input_ids.device)


def load_model(
    name: str, *, device: str = "auto", dtype: str = "auto", tokenizer: str | None = None
) -> LanguageModel:
    """A checkpoint directory or a name on the hub, with the weights in safetensors form only.

    Args:
        device: "auto" (CUDA where there is one), or a PyTorch device name.
        dtype: "auto" (as saved; float32 on a CPU), "float32", "bfloat16" or "float16".
        tokenizer: a directory or name, where the model's own has none.

    Raises:
        UserError: nothing there, no network, no tokenizer, a pickle, a vocabulary too small,
            weights that are missing, damaged or of another shape.
    """
    place = make_device(device, "--device")
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"--dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}")
    # bfloat16 on a CPU is slow, and rounds differently from where it was trained.
    kind = DTYPES.get(dtype, torch.float32 if place.type == "cpu" else "auto")
    model: Any = load_weights(name, dtype=kind)
    words = tokenizer or name
    advice = "; give one with --tokenizer" if tokenizer is None else ""
    loaded = fetch(AutoTokenizer, words, "tokenizer", advice)
    # Else an IndexError deep in a forward, at whichever prompt has such a token.
    rows = model.get_input_embeddings().weight.shape[0]
    if len(loaded) > rows:
        raise UserError(
            f"--tokenizer: {words} has {len(loaded)} tokens, but {name} knows only {rows}; give "
            "the tokenizer that the model was trained with"
        )
    return LanguageModel(name, model.to(place), loaded)
