"""OSDN models in vLLM's engine: `vllm serve DIR` after `pip install 'osdn[vllm]'`.

The package's entry point `vllm.general_plugins` calls `register`. A mixer's state in vLLM is one
page a request, with four tensors: the memory S [H, K, V] and the preconditioner d [H, K] in
float32, and the convolutions' histories of q and k together and of v, [D, W − 1] in the weights'
dtype.

vLLM's internals move between minor versions; this file is tested with the one that the extra names.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention as PagedAttention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from osdn.layers.attention import Attention
from osdn.layers.mlp import SwiGLU
from osdn.layers.osdn import OSDN, former_names
from osdn.model.block import mixer_options
from osdn.model.configuration import OSDNConfig
from osdn.ops import online_scaled_delta_rule, online_scaled_delta_step
from osdn.ops.convolution import next_history, short_convolution

EMPTY_PAGE = 0  # vLLM's null block: rows that only pad a CUDA graph name it, several alike


class PagedOSDN(MambaBase, OSDN):
    """The OSDN layer over vLLM's flat batch [tokens, D], its state in vLLM's pages.

    The weights and their names are OSDN's; only where the state comes from is different.
    """

    def __init__(self, options: dict[str, Any], dtype: torch.dtype, prefix: str):
        OSDN.__init__(self, **options)
        self.prefix, self.dtype = prefix, dtype
        self.kv_cache: tuple[Tensor, ...] = ()
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"prefix: {prefix!r} names two layers")
        layers[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Whose metadata we are given: the base builder's, which knows a one-token prompt for a
        prefill and passes on how many draft tokens were accepted.
        """
        return MambaAttentionBackendEnum.SHORT_CONV

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return state_shapes(self)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return state_dtypes(self.dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_states [tokens, D] -> [tokens, D]; what only pads the batch comes back as zeros.

        One opaque operator for torch.compile, since it reads the batch's metadata.
        """
        output = torch.zeros_like(hidden_states)
        torch.ops.vllm.osdn_mixer(hidden_states, output, self.prefix)
        return output

    def mix(self, hidden_states: Tensor, output: Tensor) -> None:
        """Fill output [tokens, D]: the decoding requests come first, then the prompts."""
        batch: Any = get_forward_context().attn_metadata
        if batch is None:  # vLLM measures the memory that a step takes; there are no pages yet
            cu_seqlens = torch.tensor([0, len(hidden_states)], device=hidden_states.device)
            output.copy_(self._run(hidden_states, cu_seqlens, None, None))
            return
        batch = batch[self.prefix]
        decoded = batch.num_decode_tokens
        if batch.num_decodes:
            pages = batch.state_indices_tensor_d[:, 0]  # [requests], more where a graph pads them
            output[: len(pages)] = self._step(hidden_states[: len(pages)], pages)
        if batch.num_prefills:
            end = decoded + batch.num_prefill_tokens
            output[decoded:end] = self._run(
                hidden_states[decoded:end],
                batch.query_start_loc_p,
                batch.state_indices_tensor_p,
                batch.has_initial_states_p,
            )

    def _step(self, hidden_states: Tensor, pages: Tensor) -> Tensor:
        """One token of every decoding request, its state in place in its page."""
        cu_seqlens = torch.arange(len(pages) + 1, device=pages.device)
        q, k, v = self._convolve_pages(hidden_states, cu_seqlens, pages, None)
        beta, log_gamma, log_alpha = self.gates(hidden_states)
        S, d = self.kv_cache[:2]
        o, _, _ = online_scaled_delta_step(
            q, k, v, beta, log_gamma, log_alpha=log_alpha, state=S, precond=d,
            slots=torch.where(pages == EMPTY_PAGE, -1, pages), backend=self.backend, **self.rule,
        )  # fmt: skip
        return self._finish(o, hidden_states)

    def _run(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        pages: Tensor | None,
        has_past: Tensor | None,
    ) -> Tensor:
        """Pieces of prompts [tokens, D]; a prompt's first piece starts from d_1 and S = 0."""
        q, k, v = self._convolve_pages(hidden_states, cu_seqlens, pages, has_past)
        beta, log_gamma, log_alpha = self.gates(hidden_states)
        state, precond = None, self.start_precond()
        if pages is not None and has_past is not None:
            S, d, at = self.kv_cache[0], self.kv_cache[1], pages.long()
            state = torch.where(has_past[:, None, None, None], S[at], 0.0)
            first = d.new_ones(d.shape[1:]) if precond is None else precond.to(d.dtype)
            precond = torch.where(has_past[:, None, None], d[at], first)
        o, state, precond = online_scaled_delta_rule(
            q[None], k[None], v[None], beta[None],
            None if log_gamma is None else log_gamma[None],
            log_alpha=None if log_alpha is None else log_alpha[None],
            initial_state=state, initial_precond=precond, output_final_state=pages is not None,
            cu_seqlens=cu_seqlens, backend=self.backend, **self.rule,
        )  # fmt: skip
        if pages is not None:
            assert state is not None and precond is not None
            S[at], d[at] = state, precond
        return self._finish(o[0], hidden_states)

    def _convolve_pages(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        pages: Tensor | None,
        has_past: Tensor | None,
    ) -> list[Tensor]:
        """q, k [tokens, H, K] of unit length and v [tokens, H, V]; moves the pages' histories on.

        has_past [sequences]: which have a history in their page; None: all.
        """
        befores: list[Tensor | None] = [None] * 3
        if pages is not None:
            at = pages.long()
            qk, value = (history[at] for history in self.kv_cache[2:])
            if has_past is not None:
                qk, value = (torch.where(has_past[:, None, None], x, 0.0) for x in (qk, value))
            befores = [*qk.chunk(2, dim=1), value]
        made, after = [], []
        for projection, convolution, before in zip(
            (self.q_proj, self.k_proj, self.v_proj),
            (self.q_conv1d, self.k_conv1d, self.v_conv1d),
            befores,
        ):
            x, weight = projection(hidden_states)[None], convolution.weight.squeeze(1)
            y = short_convolution(
                x, weight, cu_seqlens, head_dim=convolution.head_dim, history=before
            )
            made.append(y[0].unflatten(-1, (self.num_heads, -1)))
            after.append(next_history(x, weight.shape[1], cu_seqlens, before))
        if pages is not None:
            qk, value = self.kv_cache[2:]
            qk[at], value[at] = torch.cat(after[:2], dim=1), after[2]
        return made

    def _finish(self, o: Tensor, hidden_states: Tensor) -> Tensor:
        """o [tokens, H, V] -> norm, output gate and projection, [tokens, D]."""
        o = self.o_norm(o.to(self.o_norm.weight.dtype)).flatten(-2)
        gate = 1.0 if self.g_proj is None else F.silu(self.g_proj(hidden_states))
        return self.o_proj(o * gate)


def state_shapes(mixer: OSDN) -> tuple[tuple[int, ...], ...]:
    """Of S, d, and the histories of q and k and of v."""
    H, K, V = mixer.num_heads, mixer.head_dim, mixer.head_v_dim
    gap = mixer.q_conv1d.kernel_size[0] - 1
    return (H, K, V), (H, K), (2 * H * K, gap), (H * V, gap)


def state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """S and d are float32 whatever the weights are."""
    return torch.float32, torch.float32, dtype, dtype


def _mixer(hidden_states: Tensor, output: Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].mix(hidden_states, output)


def _mixer_fake(hidden_states: Tensor, output: Tensor, layer_name: str) -> None:
    return None


direct_register_custom_op(
    op_name="osdn_mixer", op_func=_mixer, mutates_args=["output"], fake_impl=_mixer_fake
)


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
        q, k = (self._rotate(x, positions) for x in (q, k))
        return self.o_proj(self.attn(q.flatten(-2), k.flatten(-2), v.flatten(-2)))

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [tokens, H, K], each token at its own position."""
        K = x.shape[-1]
        pair = torch.arange(0, K, 2, device=x.device, dtype=torch.float32)
        angle = positions.float()[:, None, None] * self.rope_theta ** (-pair / K)
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
        x = self.attn_norm(hidden_states)
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

    Pure models and hybrids with attention layers alike. Tensor and pipeline parallelism and
    speculation are refused. Prefix caching is turned off (see vllm_plugin). With speculation, and
    with prefix caching when prompts came in pieces, some requests got other tokens than `generate`
    makes.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        parallel = vllm_config.parallel_config
        for option in ("tensor_parallel_size", "pipeline_parallel_size"):
            if (size := getattr(parallel, option)) != 1:
                raise ValueError(f"{option}: OSDN models are served with 1, got {size}")
        if vllm_config.speculative_config is not None:
            raise ValueError("speculative_config: OSDN models are served without speculation")
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
