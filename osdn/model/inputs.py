"""What transformers' names for a model's inputs mean here: checks, and packed documents."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from osdn.layers.cache import token_mask


def check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None, cache: Any) -> None:
    """ValueError for what is no batch of token ids or embeddings, or no cache."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids, inputs_embeds: expected exactly one of the two")
    if input_ids is not None and input_ids.ndim != 2:
        raise ValueError(
            f"input_ids: expected [B, T], got shape {list(input_ids.shape)}; "
            "a single sequence is input_ids[None]"
        )
    if inputs_embeds is not None and inputs_embeds.ndim != 3:
        raise ValueError(
            f"inputs_embeds: expected [B, T, D], got shape {list(inputs_embeds.shape)}"
        )
    name, given = (
        ("inputs_embeds", inputs_embeds) if input_ids is None else ("input_ids", input_ids)
    )
    if given is not None and not given.numel():
        raise ValueError(
            f"{name}: expected at least one sequence and one token, got shape {list(given.shape)}"
        )
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values: expected a transformers Cache, got {type(cache).__name__}; "
            "build one as osdn.OSDNCache(model.config)"
        )


def check_labels(labels: Tensor, B: int, T: int) -> None:
    """ValueError unless there is a label for every token."""
    if labels.shape != (B, T):
        raise ValueError(
            f"labels: expected [B, T] = {[B, T]} like the tokens, got shape {list(labels.shape)}"
        )


def check_attentions(output_attentions: bool | None) -> None:
    """ValueError where attention weights are asked for, which no layer makes."""
    if output_attentions:
        raise ValueError("output_attentions: expected False or None; no layer makes such weights")


def padding_masks(
    attention_mask: Tensor | None, hidden_states: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(the whole mask, the mask of the last T tokens), each None where it has no padding.

    Raises:
        ValueError: a wrong shape, or values that are not 0 and 1, as numbers of documents are.
    """
    recent = token_mask(attention_mask, hidden_states)  # [B, T]
    if attention_mask is None or recent is None or not has_values(attention_mask):
        return attention_mask, recent
    real = attention_mask.bool()
    facts = torch.stack([real.all(), recent.all(), (attention_mask == real).all()])
    # No padding is then as no mask at all, which saves sorting rows in every layer.
    all_real, recent_real, plain = facts.tolist()  # one wait for the device
    if not plain:
        raise ValueError(
            "attention_mask: expected zeros and ones, got other values; give numbers of packed "
            "documents as seq_idx, or their offsets as cu_seqlens"
        )
    return None if all_real else attention_mask, None if recent_real else recent


def has_values(x: Tensor) -> bool:
    """Whether x can be read: not on the meta device, nor inside a compiler."""
    return not (x.is_meta or torch.compiler.is_compiling())


def packed_offsets(
    shape: tuple[int, int],
    *,
    cu_seqlens: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    seq_idx: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    cache: Cache | None,
) -> Tensor | None:
    """Offsets of the packed documents in B · T tokens, or None where every row is one document.

    Documents are told by offsets (cu_seqlens, or by transformers' name cu_seq_lens_q), by seq_idx,
    a number for each token, or by position_ids that start again at 0. Those that are given must
    agree.

    Args:
        shape: (B, T).

    Raises:
        ValueError: a wrong shape, a contradiction, or positions that mean something else.
    """
    # Three ways to say the same. Each that is given is read, and they are compared.
    offsets = _given_offsets(cu_seqlens, cu_seq_lens_q, cu_seq_lens_k)
    for name, given in (("seq_idx", seq_idx), ("position_ids", position_ids)):
        if given is None:
            continue
        rows = given[None] if given.ndim == 1 else given  # [B or 1, T]
        if rows.ndim != 2 or len(rows) not in (1, shape[0]) or rows.shape[1] != shape[1]:
            raise ValueError(
                f"{name}: expected [B, T] = {list(shape)}, got shape {list(given.shape)}"
            )
        rows = rows.expand(shape)
        if shape[1] == 1:
            continue  # one token: no start but its own
        if not has_values(rows):
            if offsets is None:
                raise ValueError(
                    f"{name}: its values cannot be read inside a compiled or exported model; give "
                    "cu_seqlens for packed documents, else nothing"
                )
            continue
        if name == "seq_idx":
            starts = rows[:, 1:] != rows[:, :-1]  # [B, T − 1]
        else:
            starts = _restarts(rows, attention_mask, cache)
        # No start inside a row: rows are whole documents, and need no offsets.
        found = _offsets(starts) if bool(starts.any()) else None
        if offsets is None:
            offsets = found
        elif found is None or not _agree(found, offsets):
            raise ValueError(f"{name}: its documents are not those of the offsets given with it")
    return offsets


def _given_offsets(*given: Tensor | None) -> Tensor | None:
    """The one tensor of offsets behind its three names."""
    there = [x for x in given if x is not None]
    for other in there[1:]:
        if has_values(other) and other is not there[0] and not _agree(other, there[0]):
            raise ValueError(
                "cu_seqlens, cu_seq_lens_q, cu_seq_lens_k: expected the same offsets, got different"
            )
    return there[0] if there else None


def _agree(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a.to(b.device) == b).all())


def _offsets(starts: Tensor) -> Tensor:
    """[N + 1] int32: 0, every document's start but the first of all, and B · T.

    starts: [B, T − 1], True where a document starts at the next token; every row starts one.
    """
    first = starts.new_ones(len(starts), 1)  # a row's first token always starts one
    at = torch.cat([first, starts], dim=1).flatten().nonzero()[:, 0]
    end = at.new_full((1,), starts.numel() + len(starts))
    return torch.cat([at, end]).int()


def _restarts(rows: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
    """[B, T − 1]: where position ids [B, T] start again; an error where they do not just count."""
    # Positions are no input here: they only tell documents apart, or must be the plain count.
    starts = rows[:, 1:] == 0
    recent = token_mask(attention_mask, rows[..., None])
    if attention_mask is None or recent is None or bool(recent.all()):
        counts = (rows[:, 1:] == rows[:, :-1] + 1) | starts
    else:  # ahead of the number of real tokens by the same for all real tokens of a row
        ahead = rows - attention_mask.bool().cumsum(1)[:, -rows.shape[1] :]  # [B, T]
        first = ahead.gather(1, recent.long().argmax(1, keepdim=True))
        counts = (ahead == first) | ~recent
        starts = torch.zeros_like(starts)
    past = 0 if cache is None or attention_mask is not None else _length(cache)
    if not bool(counts.all()) or (past and bool((rows[:, 0] != past).any())):
        raise ValueError(
            "position_ids: expected positions that count a row's real tokens, from the cache's "
            "length on with a cache, or that start again at 0 for packed documents without "
            "padding; leave them out, or give cu_seqlens"
        )
    return starts


def _length(cache: Cache) -> int:
    """Tokens in the cache; 0 where transformers' own cannot tell, without attention layers."""
    try:
        return cache.get_seq_length()
    except ValueError:
        return 0
