"""What a mixer reads of a transformers cache and of a padding mask."""

from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

Mixed = tuple[Tensor, None, Cache | None]


def token_mask(attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
    """The last T columns of a padding mask [B, ≥T], as booleans."""
    B, T, _ = hidden_states.shape
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or len(attention_mask) != B or attention_mask.shape[1] < T:
        raise ValueError(
            f"attention_mask: expected [B, T] = [{B}, {T}] of zeros and ones (or longer, with a "
            f"cache), got shape {tuple(attention_mask.shape)}"
        )
    # With a cache the mask covers the past too; what is past has been read.
    return attention_mask[:, -T:].bool()


def linear_cache(
    past_key_values: Cache | None, layer_idx: int | None, cu_seqlens: Tensor | None
) -> LinearAttentionLayer | None:
    """This layer's part of a transformers cache, with its two slots, or None without a cache."""
    if past_key_values is None:
        return None
    if layer_idx is None:
        raise ValueError("past_key_values: this layer has no layer_idx; give one when building it")
    # A cache's rows are sequences, and so are a pack's parts: the two cannot be matched.
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected none with a cache; pack or decode, not both")
    layers = past_key_values.layers
    # The slots are S and d, and the two histories of the convolutions.
    cache = layers[layer_idx] if layer_idx < len(layers) else None
    if not isinstance(cache, LinearAttentionLayer) or cache.number_of_states < 2:
        raise ValueError(
            f"past_key_values: expected a linear-attention layer with 2 state slots at index "
            f"{layer_idx}, got {cache}; build the cache as osdn.OSDNCache(model.config)"
        )
    # Assisted generation undoes tokens. S and d keep no record to undo them from.
    if cache.record_past:
        raise ValueError(
            "past_key_values: this cache records a past to crop, and the memory of an osdn or "
            "delta_net layer cannot be rolled back; keep a copy of the cache, or give no assistant"
        )
    return cache
