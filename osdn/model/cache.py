"""transformers' DynamicCache, for models that may have no attention layer at all."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, LinearAttentionLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# What `generate` and the outputs call the cache: "past_key_values" up to transformers 5.23, "cache"
# since. The models' forward takes both.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in [field.name for field in fields(BaseModelOutputWithPast)]
)

NO_ROLLBACK = (
    "crop, activate_past_recording: expected a cache of attention layers only; the memory of an "
    "osdn or delta_net layer cannot go back; copy.deepcopy the cache before the tokens to be undone"
)


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, by whichever of its two names it was given."""
    if past_key_values is None:
        return cache
    if cache is not None and cache is not past_key_values:
        raise ValueError("cache, past_key_values: two names of one argument; give one of them")
    return past_key_values


class StateLayer(LinearAttentionLayer):
    """transformers' cache layer for a memory of constant size, with its methods for batches.

    What was written cannot be taken back: a state holds no past to crop to.
    """

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times in a row."""
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """The sequences of these indices, in their order."""
        self._each(lambda x: x[indices.to(x.device)])

    def activate_past_recording(self) -> None:
        raise RuntimeError(NO_ROLLBACK)

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError(NO_ROLLBACK)

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for i, x in states.items():
                states[i] = None if x is None else change(x)


class OSDNCache(DynamicCache):
    """A DynamicCache that knows how many tokens it has seen, whatever its layers are.

    transformers reads a cache's length off its first attention layer and raises where there is
    none (5.17 to 5.24); this one counts, so that `generate` can start and go on from it. It can go
    when DynamicCache(config=...) answers get_seq_length() for linear-attention layers.

    captured: whether tokens may go through a captured step (osdn/model/decoding.py); `generate`
        sets it. slabs: the buffers that hold all layers' states while they do, sequences second.
    """

    def __init__(self, config: PretrainedConfig):
        super().__init__(config=config)
        # transformers' linear layers lack the methods that beams need.
        self.layers = [
            StateLayer(layer.number_of_states) if type(layer) is LinearAttentionLayer else layer
            for layer in self.layers
        ]
        self.tokens_seen = 0
        self.captured = False
        self.slabs: tuple[Tensor, ...] | None = None

    @property
    def is_compileable(self) -> bool:
        """False, so that `generate` hands us its two-dimensional padding mask as it is."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """All False: `generate` of 5.24 takes a cache of linear layers alone for one without a
        length, and would hand us the tokens that the cache has seen again."""
        return [False] * len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        # With an attention layer transformers' own count is right.
        if any(isinstance(layer, CacheLayerMixin) for layer in self.layers):
            return super().get_seq_length(layer_idx)
        return self.tokens_seen

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens; RuntimeError, before anything is changed, where a layer cannot."""
        # All layers are looked at first: half a crop would leave a cache of two lengths.
        self._refuse_rollback()
        super().crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """As crop."""
        self._refuse_rollback()
        super().activate_past_recording()

    def _refuse_rollback(self) -> None:
        if any(isinstance(layer, StateLayer) for layer in self.layers):
            raise RuntimeError(NO_ROLLBACK)

    def reset(self) -> None:
        super().reset()
        self.tokens_seen = 0

    def reorder_cache(self, beam_idx: Any) -> None:
        """Sequence i goes on as sequence beam_idx[i]; in place where a captured step reads it."""
        # A captured graph reads fixed addresses: new tensors would be ignored.
        if self.slabs is None or not all(
            held is not None and held._base is slab
            for layer in self.layers
            if isinstance(layer, LinearAttentionLayer)
            for held, slab in zip(
                (*layer.recurrent_states.values(), *layer.conv_states.values()), self.slabs
            )
        ):
            super().reorder_cache(beam_idx)
            return
        for slab in self.slabs:
            # [L, B, ...], sequences second
            slab.copy_(slab.index_select(1, beam_idx.to(slab.device)))


def state_bytes(cache: Cache) -> int:
    """Bytes that a cache's tensors take: constant for a linear-attention layer."""
    held: list[Tensor | None] = []
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            held += [*layer.recurrent_states.values(), *layer.conv_states.values()]
        else:
            held += [getattr(layer, "keys", None), getattr(layer, "values", None)]
    return sum(x.numel() * x.element_size() for x in held if x is not None)
