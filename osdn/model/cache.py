"""transformers' DynamicCache, for models that may have no attention layer at all."""

from dataclasses import fields

from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

# What `generate` and the outputs call the cache: "past_key_values" up to transformers 5.23, "cache"
# since. The models' forward takes both.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in [field.name for field in fields(BaseModelOutputWithPast)]
)


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, by whichever of its two names it was given."""
    if past_key_values is None:
        return cache
    if cache is not None and cache is not past_key_values:
        raise ValueError("cache, past_key_values: two names of one argument; give one of them")
    return past_key_values


class OSDNCache(DynamicCache):
    """A DynamicCache that knows how many tokens it has seen, whatever its layers are.

    transformers reads a cache's length off its first attention layer and raises where there is
    none (5.17 to 5.24); this one counts, so that `generate` can start and go on from it. It can go
    when DynamicCache(config=...) answers get_seq_length() for linear-attention layers.
    """

    def __init__(self, config: PretrainedConfig):
        super().__init__(config=config)
        self.tokens_seen = 0

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
        if any(isinstance(layer, CacheLayerMixin) for layer in self.layers):
            return super().get_seq_length(layer_idx)
        return self.tokens_seen

    def reset(self) -> None:
        super().reset()
        self.tokens_seen = 0
