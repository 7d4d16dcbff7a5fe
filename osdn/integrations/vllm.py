"""OSDN models in vLLM's engine: `vllm serve DIR` after `pip install 'osdn[vllm]'`.

The package's entry point `vllm.general_plugins` calls `vllm_plugin.register`, which names the class
below. vLLM's internals move between minor versions; tested with the one that the extra names.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention as PagedAttention
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.sequence import IntermediateTensors

from osdn.integrations.vllm_mixer import PagedOSDN, state_dtypes, state_shapes
from osdn.layers.attention import Attention
from osdn.layers.gates import former_names
from osdn.layers.mlp import SwiGLU
from osdn.layers.osdn import OSDN
from osdn.model.block import mixer_options
from osdn.model.configuration import OSDNConfig


class PagedSoftmax(Attention):
    """The attention layer of a hybrid, its keys and values in vLLM's pages."""

    def __init__(self, options: dict[str, Any], vllm_config: VllmConfig, prefix: str):
        super().__init__(**options)
        self.attn = PagedAttention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_states [tokens, D] at positions [tokens] -> [tokens, D]."""
        q, k, v = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (self._rotate(x, positions) for x in (q, k))  # [tokens, H, K] each
        # vLLM takes a head's features joined to the others', [tokens, H K].
        return self.o_proj(self.attn(q.flatten(-2), k.flatten(-2), v.flatten(-2)))

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [tokens, H, K], each token at its own position."""
        K = x.shape[-1]
        pair = torch.arange(0, K, 2, device=x.device, dtype=torch.float32)
        # In float32: a position of 10,000 in bfloat16 is off by up to 32 tokens.
        angle = positions.float()[:, None, None] * self.rope_theta ** (
            -pair / K
        )  # [tokens, 1, K/2]
        # Halves, not neighbours, are turned together, as in osdn.layers.attention.
        a, b = x.float().chunk(2, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class PagedBlock(nn.Module):
    """x ← x + mixer(norm(x)); x ← x + mlp(norm(x)), as osdn.model.block.OSDNBlock."""

    def __init__(self, config: OSDNConfig, layer_idx: int, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        assert config.intermediate_size is not None  # set by the configuration
        options = mixer_options(config, layer_idx)
        name = f"{prefix}.attn"
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn: nn.Module
        if config.mixers[layer_idx] == "attention":
            self.attn = PagedSoftmax(options, vllm_config, name)
        else:
            self.attn = PagedOSDN(options, vllm_config.model_config.dtype, name)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        x = self.attn_norm(hidden_states)  # [tokens, D]
        # Only attention needs positions: the other mixers read their order from the batch.
        mixed = self.attn(x, positions) if isinstance(self.attn, PagedSoftmax) else self.attn(x)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


@support_torch_compile
class PagedModel(nn.Module):
    """Embedding, blocks and final norm over vLLM's flat batch."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            PagedBlock(config, i, vllm_config, f"{prefix}.layers.{i}")
            for i in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [tokens, D] of the tokens at their positions [tokens]."""
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions)
        return self.norm(hidden_states)


class OSDNForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """The language model that vLLM builds for a checkpoint of osdn.OSDNForCausalLM.

    Pure models and hybrids with attention layers alike. Tensor and pipeline parallelism are
    refused (`vllm_plugin.refuse`).
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.model = PagedModel(vllm_config=vllm_config, prefix=f"{prefix}model")
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embeddings.weight

    @classmethod
    def get_mamba_state_shape_from_config(
        cls, vllm_config: VllmConfig
    ) -> tuple[tuple[int, ...], ...]:
        """Of one layer's state; all have the same."""
        config = vllm_config.model_config.hf_config
        layer = next((i for i, name in enumerate(config.mixers) if name != "attention"), None)
        if layer is None:
            raise ValueError(
                "mixer: vLLM serves models with at least one osdn or delta_net layer; this one "
                "has attention layers only"
            )
        # The layer itself says its sizes; on the meta device it costs no memory.
        with torch.device("meta"):
            return state_shapes(OSDN(**mixer_options(config, layer)))

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return state_dtypes(vllm_config.model_config.dtype)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """All four tensors are states after a token, a page each: copied as they are."""
        return (get_temporal_copy_spec,) * 4

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embeddings(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.lm_head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Every weight of the checkpoint, by its own name.

        Raises:
            ValueError: a weight that the model does not have, or one that is missing.
        """
        own = dict(self.named_parameters())
        loaded = set()
        given = dict(weights)
        # Checkpoints from before state decay have APF's gate under the name of the decay's.
        former = former_names(given)
        for name, weight in ((former.get(name, name), x) for name, x in given.items()):
            if name not in own:
                if name == "lm_head.weight" and self.config.tie_word_embeddings:
                    continue
                raise ValueError(f"{name}: the model has no such weight")
            with torch.no_grad():
                own[name].copy_(weight)
            loaded.add(name)
        if missing := sorted(own.keys() - loaded):
            raise ValueError(f"{missing[0]}: the checkpoint has no such weight")
        return loaded
