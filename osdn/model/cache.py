"""transformers' DynamicCache, for models that may have no attention layer at all."""

from transformers import PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache


class OSDNCache(DynamicCache):
    """A DynamicCache that knows how many tokens it has seen, whatever its layers are.

    transformers reads a cache's length off its first attention layer and raises where there is
    none (5.17 to 5.23); this one counts, so that `generate` can start and go on from it. It can go
    when DynamicCache(config=...) answers get_seq_length() for linear-attention layers.
    """

    def __init__(self, config: PretrainedConfig):
        super().__init__(config=config)
        self.tokens_seen = 0

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
