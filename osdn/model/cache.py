"""transformers' DynamicCache, for models that may have no attention layer at all."""

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, LinearAttentionLayer


class OSDNCache(DynamicCache):
    """A DynamicCache that knows how many tokens it has seen, whatever its layers are.

    transformers reads a cache's length off its first attention layer and raises where there is
    none (5.17 to 5.23); this one counts, so that `generate` can start and go on from it. It can go
    when DynamicCache(config=...) answers get_seq_length() for linear-attention layers.

    captured: whether tokens may go through a captured step (osdn/model/decoding.py); `generate`
        sets it. slabs: the buffers that hold all layers' states while they do, sequences second.
    """

    def __init__(self, config: PretrainedConfig):
        super().__init__(config=config)
        self.tokens_seen = 0
        self.captured = False
        self.slabs: tuple[Tensor, ...] | None = None

    @property
    def is_compileable(self) -> bool:
        """False, so that `generate` hands us its two-dimensional padding mask as it is."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if any(isinstance(layer, CacheLayerMixin) for layer in self.layers):
            return super().get_seq_length(layer_idx)
        return self.tokens_seen

    def reset(self) -> None:
        super().reset()
        self.tokens_seen = 0

    def reorder_cache(self, beam_idx: Any) -> None:
        """Sequence i goes on as sequence beam_idx[i]; in place where a captured step reads it."""
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
