"""The OSDN language model, in Hugging Face's form.

Importing this module registers the classes with AutoConfig, AutoModel and AutoModelForCausalLM.
Parameter names are those of flash-linear-attention's DeltaNet.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple

from osdn.layers.cache import token_mask
from osdn.layers.osdn import OSDN, ForgettingGate
from osdn.model.block import OSDNBlock
from osdn.model.cache import OSDNCache
from osdn.model.configuration import OSDNConfig
from osdn.model.decoding import last_logits
from osdn.model.loss import cross_entropy, linear_cross_entropy, next_token_labels


class OSDNPreTrainedModel(PreTrainedModel):
    """What the two models share: initial values, gradient checkpointing, the names FSDP needs."""

    config_class = OSDNConfig
    config: OSDNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OSDNBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True

    def __init__(self, config: OSDNConfig):
        config._validate()  # they may have been changed since it was made
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Called by transformers for every module, children first; loaded weights stay.

        It is not called for a module whose own parameters are all loaded, even where a child's are
        not: so the gate is known by its type, and does not wait for its layer.
        """
        super()._init_weights(module)
        if isinstance(module, OSDN | ForgettingGate):
            module.reset_special_parameters()


class OSDNModel(OSDNPreTrainedModel):
    """Embedding, blocks and final norm: token ids [B, T] -> hidden states [B, T, D]."""

    def __init__(self, config: OSDNConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(OSDNBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm.

        Args:
            input_ids: [B, T] int64, or inputs_embeds: [B, T, D].
            attention_mask: [B, T] (past and new tokens with a cache), 0 where a token is padding,
                on the left or on the right.
            past_key_values: a cache to go on from, an OSDNCache(config) or transformers' own
                DynamicCache(config=config); `generate` takes the latter with attention layers only.
            use_cache: keep and return a cache; None means config.use_cache outside training.
            output_hidden_states: also return the input of every block and the final result; None
                means config.output_hidden_states.
            cu_seqlens: [N + 1] offsets of sequences packed along T; B must be 1.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of the two")
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seqlens is None
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if self.gradient_checkpointing and self.training:
            use_cache = False
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values: expected none in training with gradient checkpointing, which "
                    "runs every block twice; call model.eval() before generating"
                )
        if use_cache and past_key_values is None:
            past_key_values = OSDNCache(self.config)
        if attention_mask is not None and not torch.compiler.is_compiling():
            token_mask(attention_mask, hidden_states)  # refuses a wrong shape, if all ones too
            attention_mask = None if bool(attention_mask.all()) else attention_mask

        seen = []
        for block in self.layers:
            seen.append(hidden_states)
            hidden_states = block(
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                cu_seqlens=cu_seqlens,
            )
        hidden_states = self.norm(hidden_states)
        if use_cache and isinstance(past_key_values, OSDNCache):
            past_key_values.tokens_seen += hidden_states.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*seen, hidden_states) if output_hidden_states else None,
        )


class OSDNForCausalLM(OSDNPreTrainedModel, GenerationMixin):
    """The language model: OSDNModel and an output layer onto the vocabulary."""

    accepts_loss_kwargs = True  # so that transformers' Trainer gives num_items_in_batch
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: OSDNConfig):
        super().__init__(config)
        self.model = OSDNModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict, *rest: Any
    ) -> None:
        """Start `generate` from an OSDNCache where transformers would make a DynamicCache.

        Nor can it go on from one without attention layers, which cannot tell its length.
        """
        implementation = generation_config.cache_implementation
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, OSDNCache | None) and "attention" not in self.config.mixers:
            raise ValueError(
                "past_key_values: expected an OSDNCache for a model without attention layers, got "
                f"{type(cache).__name__}; give generate an osdn.OSDNCache(model.config)"
            )
        if implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation: expected none or 'dynamic', got {implementation!r}: the "
                "memory of an osdn or delta_net layer has one constant size"
            )
        if cache is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = OSDNCache(self.config)
        else:
            prepare: Any = GenerationMixin._prepare_cache_for_generation
            prepare(self, generation_config, model_kwargs, *rest)
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, OSDNCache):
            cache.captured = not generation_config.disable_compile

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocabulary] in the weights' dtype and, given labels, the mean loss.

        Args as in OSDNModel.forward, and:
            labels: [B, T] token ids, shifted here; −100 where nothing is to be predicted. Position
                t is scored on label t+1, within its own packed sequence. In training mode the
                loss is taken in chunks and logits is None, if lm_head is a plain nn.Linear without
                bias; else, and in evaluation, logits are always there.
            logits_to_keep: logits of only the last so many positions, 0 means all; or of the
                positions in an index tensor.
            cu_seq_lens_q: transformers' name for cu_seqlens. DataCollatorWithFlattening gives it
                with return_flash_attn_kwargs=True and return_position_ids=False, beside
                cu_seq_lens_k (the same offsets), max_length_q and max_length_k: not needed here.
            num_items_in_batch: what the summed loss is divided by, from transformers' Trainer.
        """
        if cu_seqlens is None:
            cu_seqlens = cu_seq_lens_q
        plain = (
            (labels is None and inputs_embeds is None and cu_seqlens is None)
            and (use_cache or (use_cache is None and self.config.use_cache))
            and not (output_hidden_states or self.config.output_hidden_states)
            and isinstance(logits_to_keep, int)
            and (logits_to_keep == 1 or (input_ids is not None and input_ids.shape[1:] == (1,)))
        )
        if plain and isinstance(past_key_values, OSDNCache) and past_key_values.captured:
            logits = last_logits(self, input_ids, attention_mask, past_key_values)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        outputs = self.model(
            input_ids,
            attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cu_seqlens=cu_seqlens,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        kept = logits_to_keep
        if labels is None or not (self.training and self._head_is_plain()):
            at = kept if isinstance(kept, Tensor) else slice(-kept, None)
            logits = self.lm_head(hidden_states[:, at])
        if labels is not None:
            device = hidden_states.device if logits is None else logits.device
            targets = next_token_labels(labels, cu_seqlens).flatten().to(device)
            if isinstance(num_items_in_batch, Tensor):
                num_items_in_batch = num_items_in_batch.to(device)
            whole = logits if isinstance(kept, int) and kept == 0 else None
            loss = self._loss(hidden_states, whole, targets, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _head_is_plain(self) -> bool:
        """Whether the output layer is its weight alone: no bias, adapter, wrapper or shards."""
        return type(self.lm_head) is nn.Linear and self.lm_head.bias is None

    def _loss(
        self,
        hidden_states: Tensor,
        logits: Tensor | None,
        targets: Tensor,
        count: Tensor | int | None,
    ) -> Tensor:
        """From logits of all positions; where there are none, in chunks, if the head allows it."""
        if logits is None and self._head_is_plain():
            hidden = hidden_states.flatten(0, 1)
            return linear_cross_entropy(hidden, self.lm_head.weight, targets, count)
        logits = self.lm_head(hidden_states) if logits is None else logits
        return cross_entropy(logits.flatten(0, 1), targets, count)


AutoConfig.register(OSDNConfig.model_type, OSDNConfig)
AutoModel.register(OSDNConfig, OSDNModel)
AutoModelForCausalLM.register(OSDNConfig, OSDNForCausalLM)
# transformers' Trainer shifts the labels that it smooths for the classes named here alone.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[OSDNConfig.model_type] = OSDNForCausalLM.__name__
