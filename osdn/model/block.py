"""A block of the OSDN language model: (norm, mixer) and (norm, SwiGLU)."""

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from osdn.layers.attention import Attention
from osdn.layers.mlp import SwiGLU
from osdn.layers.osdn import OSDN
from osdn.model.configuration import OSDNConfig


def mixer_options(config: OSDNConfig, layer_idx: int) -> dict[str, Any]:
    """What the configuration says of one layer's mixer, as the mixer's keyword arguments."""
    options: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "layer_idx": layer_idx,
    }
    if config.mixers[layer_idx] == "attention":
        # Softmax attention has none of the delta rule's options.
        return {**options, "rope_theta": config.rope_theta}
    decays = {"osdn": config.state_decay, "delta_net": "none", "gated_delta_net": "data"}
    return {
        **options,
        "head_v_dim": config.head_v_dim,
        # delta_net is OSDN with d fixed: one code path, so that the two can be compared.
        "adaptive": config.mixers[layer_idx] == "osdn",
        "forgetting": config.forgetting,
        "state_decay": decays[config.mixers[layer_idx]],
        "eta": config.eta,
        "beta_aware": config.beta_aware,
        "precond_min": config.precond_min,
        "precond_max": config.precond_max,
        "learn_initial_precond": config.learn_initial_precond,
        "allow_neg_eigval": config.allow_neg_eigval,
        "use_output_gate": config.use_output_gate,
        "conv_size": config.conv_size,
        "norm_eps": config.norm_eps,
    }


def build_mixer(config: OSDNConfig, layer_idx: int) -> OSDN | Attention:
    """The token mixer that the configuration names for one layer."""
    kind = Attention if config.mixers[layer_idx] == "attention" else OSDN
    return kind(**mixer_options(config, layer_idx))


class OSDNBlock(GradientCheckpointingLayer):
    """x ← x + mixer(norm(x)); x ← x + mlp(norm(x))."""

    def __init__(self, config: OSDNConfig, layer_idx: int):
        super().__init__()
        assert config.intermediate_size is not None  # set by the configuration
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = build_mixer(config, layer_idx)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        # The norms' weights stay float32 under FSDP2; their results go on in the stream's dtype.
        mixed, _, _ = self.attn(
            self.attn_norm(hidden_states).to(hidden_states.dtype),
            attention_mask,
            past_key_values,
            use_cache,
            cu_seqlens,
        )
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.mlp_norm(hidden_states).to(hidden_states.dtype))
