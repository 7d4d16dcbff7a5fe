"""The OSDN language model, in Hugging Face's form.

Importing this module registers the classes with AutoModel and AutoModelForCausalLM.
Parameter names are those of flash-linear-attention's DeltaNet.
"""

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import GroupWeightRename
from transformers.generation import GenerationConfig
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple

from osdn.layers.gates import FORMER_GATE, GATE, ForgettingGate
from osdn.layers.osdn import OSDN
from osdn.model.block import OSDNBlock
from osdn.model.cache import CACHE, OSDNCache, one_cache
from osdn.model.card import write_card
from osdn.model.configuration import OSDNConfig
from osdn.model.decoding import last_logits
from osdn.model.inputs import (
    check_attentions,
    check_inputs,
    check_labels,
    packed_offsets,
    padding_masks,
)
from osdn.model.loss import cross_entropy, linear_cross_entropy, next_token_labels


class FormerGate(GroupWeightRename):
    """`osdn.layers.gates.former_names` in from_pretrained: known by the bias, which comes first.

    What is saved again has the present names.
    """

    def reverse_transform(self) -> GroupWeightRename:
        names = [f"attn.{GATE}.{last}" for last in ("bias", "weight")]
        return GroupWeightRename(names, names)


class OSDNPreTrainedModel(PreTrainedModel):
    """What the two models share: initial values, gradient checkpointing, the names FSDP needs."""

    config_class = OSDNConfig
    config: OSDNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OSDNBlock"]  # noqa: RUF012  # what FSDP and device_map keep together
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True  # transformers then lets attention layers be as they are
    _is_stateful = True  # assisted generation, which undoes tokens, refuses such models

    def __init__(self, config: OSDNConfig):
        config._validate()  # they may have been changed since it was made
        super().__init__(config)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: see OSDNConfig.save_pretrained for what stands beside a checkpoint."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As transformers does, with a model card beside it; a card of the user's own stays."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            write_card(Path(save_directory), self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Called by transformers for every module, children first; loaded weights stay.

        It is not called for a module whose own parameters are all loaded, even where a child's are
        not: so the gate is known by its type, and does not wait for its layer.
        """
        # transformers' own values first: it sets biases to 0, and would set 6.9 to 0.
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
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        output_attentions: bool | None = None,
        token_type_ids: Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm.

        Args:
            input_ids: [B, T] int64, or inputs_embeds: [B, T, D].
            attention_mask: [B, T] (past and new tokens with a cache), 0 where a token is padding,
                anywhere in a row.
            past_key_values: a cache to go on from, an OSDNCache(config) or transformers' own
                DynamicCache(config=config); `generate` takes the latter with attention layers only.
            use_cache: keep and return a cache; None means config.use_cache outside training.
            output_hidden_states: also return the input of every block and the final result; None
                means config.output_hidden_states.
            cu_seqlens: [N + 1] offsets of sequences packed along T; B must be 1.
            cache: the name of past_key_values since transformers 5.24.
            position_ids: [B, T], not needed. Where they start again at 0, packed documents start;
                else they must count the real tokens. Not read for a single token.
            seq_idx: [B, T] numbers of packed documents.
            cu_seq_lens_q, cu_seq_lens_k: transformers' names for cu_seqlens.
            max_length_q, max_length_k, token_type_ids: taken, as transformers' models take them;
                nothing here depends on them.
            output_attentions: None or False.
        """
        # What the arguments say is settled before the first layer runs.
        past_key_values = one_cache(past_key_values, cache)
        check_inputs(input_ids, inputs_embeds, past_key_values)
        check_attentions(output_attentions)
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        B, T = hidden_states.shape[:2]
        # Attention sees the cache's tokens, the others only the new ones.
        attention_mask, recent = padding_masks(attention_mask, hidden_states)
        cu_seqlens = packed_offsets(
            (B, T),
            cu_seqlens=cu_seqlens,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            seq_idx=seq_idx,
            position_ids=position_ids,
            attention_mask=attention_mask,
            cache=past_key_values,
        )
        # Offsets count all rows one after another, so that a batch becomes one row.
        if flat := cu_seqlens is not None and B > 1:  # rows one after another
            hidden_states = hidden_states.flatten(0, 1)[None]
            attention_mask = None if attention_mask is None else attention_mask.flatten()[None]
            recent = None if recent is None else recent.flatten()[None]
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seqlens is None
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        # Each block runs a second time in the backward, and would write the cache twice.
        if self.gradient_checkpointing and self.training:
            use_cache = False
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values: expected none in training with gradient checkpointing, which "
                    "runs every block twice; call model.eval() before generating"
                )
        if use_cache and past_key_values is None:
            past_key_values = OSDNCache(self.config)

        # Blocks' inputs; kept only as references, and dropped unless asked for.
        seen = []
        for block, mixer in zip(self.layers, self.config.mixers):
            seen.append(hidden_states)
            hidden_states = block(
                hidden_states,
                attention_mask=attention_mask if mixer == "attention" else recent,
                past_key_values=past_key_values,
                use_cache=use_cache,
                cu_seqlens=cu_seqlens,
            )
        # The norm's weight may be float32 in a bfloat16 stream.
        hidden_states = self.norm(hidden_states).to(hidden_states.dtype)
        # Other caches count by themselves.
        if use_cache and isinstance(past_key_values, OSDNCache):
            past_key_values.tokens_seen += T
        if flat:
            hidden_states = hidden_states.view(B, T, -1)
            seen = [x.view(B, T, -1) for x in seen]
        named: dict[str, Any] = {CACHE: past_key_values}
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=(*seen, hidden_states) if output_hidden_states else None,
            **named,
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

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As transformers does, less the tokenizer that `generate` hands on with stop_strings.

        transformers looks for two parameters by name: inputs_embeds, for `generate` to take them,
        and kwargs, to check names against those of forward.
        """
        # Popped: forward takes no **kwargs, so that a misspelt argument is an error.
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        prepare: Any = GenerationMixin.prepare_inputs_for_generation
        return prepare(self, input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """What transformers' generate_batch starts with: it knows no memory of constant size.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "generate_batch: transformers' continuous batching has no linear attention; use "
            "generate, or vLLM for requests that come and go (pip install 'osdn[vllm]')"
        )

    def _prepare_position_ids_for_generation(self, *_: Any) -> None:
        """None: the layers count tokens themselves, and positions would be checked at each step."""

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict, *rest: Any
    ) -> None:
        """Start `generate` from an OSDNCache where transformers would make a DynamicCache.

        Nor can it go on from one without attention layers, which cannot tell its length.
        """
        implementation = generation_config.cache_implementation
        cache = model_kwargs.get(CACHE)
        if not isinstance(cache, OSDNCache | None) and "attention" not in self.config.mixers:
            raise ValueError(
                f"{CACHE}: expected an OSDNCache for a model without attention layers, got "
                f"{type(cache).__name__}; give generate an osdn.OSDNCache(model.config)"
            )
        if implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation: expected none or 'dynamic', got {implementation!r}: the "
                "memory of an osdn or delta_net layer has one constant size"
            )
        # Only then does transformers have to make none; a cache that is given goes on.
        if cache is None and generation_config.use_cache:
            model_kwargs[CACHE] = OSDNCache(self.config)
        else:
            prepare: Any = GenerationMixin._prepare_cache_for_generation
            prepare(self, generation_config, model_kwargs, *rest)
        cache = model_kwargs.get(CACHE)
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
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        output_attentions: bool | None = None,
        token_type_ids: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocabulary] in the weights' dtype and, given labels, the mean loss.

        Args as in OSDNModel.forward, and:
            labels: [B, T] token ids, shifted here; −100 where nothing is to be predicted. Position
                t is scored on label t+1, within its own packed sequence. In training mode the
                loss is taken in chunks and logits is None, if lm_head is a plain nn.Linear without
                bias; else, and in evaluation, logits are always there.
            logits_to_keep: logits of only the last so many positions, 0 means all; or of the
                positions in an index tensor.
            num_items_in_batch: what the summed loss is divided by, from transformers' Trainer.
        """
        past_key_values = one_cache(past_key_values, cache)
        check_inputs(input_ids, inputs_embeds, past_key_values)
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        B, T = given.shape[:2]
        if labels is not None:
            check_labels(labels, B, T)
        cu_seqlens = packed_offsets(
            (B, T),
            cu_seqlens=cu_seqlens,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            seq_idx=seq_idx,
            position_ids=position_ids,
            attention_mask=attention_mask,
            cache=past_key_values,
        )
        named: dict[str, Any] = {CACHE: past_key_values}
        others = (labels, inputs_embeds, cu_seqlens, output_hidden_states, output_attentions)
        logits = last_logits(
            self, past_key_values, input_ids, attention_mask,
            use_cache=use_cache, logits_to_keep=logits_to_keep, others=others,
        )  # fmt: skip
        if logits is not None:  # a decoding step, which asks for nothing else
            return CausalLMOutputWithPast(logits=logits, **named)
        outputs = self.model(  # labels and logits_to_keep are the head's
            input_ids,
            attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            cu_seqlens=cu_seqlens,
        )
        hidden_states = outputs.last_hidden_state
        if labels is not None and cu_seqlens is not None:
            labels = labels.flatten()[None]  # offsets are those of all rows one after another
        # In training the loss reads the hidden states in chunks: no logits of all tokens exist.
        loss = logits = None
        kept = logits_to_keep
        if labels is None or not (self.training and self._head_is_plain()):
            # slice(-0, None) is all of them.
            at = kept if isinstance(kept, Tensor) else slice(-kept, None)
            logits = self.lm_head(hidden_states[:, at])
        if labels is not None:
            device = hidden_states.device if logits is None else logits.device
            targets = next_token_labels(labels, cu_seqlens).flatten().to(device)
            if isinstance(num_items_in_batch, Tensor):
                num_items_in_batch = num_items_in_batch.to(device)
            # A part of the logits cannot be scored; the loss then makes its own.
            whole = logits if isinstance(kept, int) and kept == 0 else None
            loss = self._loss(hidden_states, whole, targets, num_items_in_batch)
        named = {CACHE: getattr(outputs, CACHE)}
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **named,
        )

    def _head_is_plain(self) -> bool:
        """Whether the output layer is its weight alone: no bias, adapter, wrapper, and no weight
        that is quantised or sharded."""
        head = self.lm_head
        return type(head) is nn.Linear and head.bias is None and type(head.weight) is nn.Parameter

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


class OSDNForSequenceClassification(GenericForSequenceClassification, OSDNPreTrainedModel):
    """OSDNModel and a linear score of each row's last token that is no padding."""


class OSDNForTokenClassification(GenericForTokenClassification, OSDNPreTrainedModel):
    """OSDNModel and a linear score of every token."""


register_checkpoint_conversion_mapping(
    OSDNConfig.model_type,
    [
        FormerGate(
            [rf"attn\.{FORMER_GATE}\.{last}" for last in ("bias", "weight")],
            [f"attn.{GATE}.{last}" for last in ("bias", "weight")],
        )
    ],
)
AutoModel.register(OSDNConfig, OSDNModel)
AutoModelForCausalLM.register(OSDNConfig, OSDNForCausalLM)
AutoModelForSequenceClassification.register(OSDNConfig, OSDNForSequenceClassification)
AutoModelForTokenClassification.register(OSDNConfig, OSDNForTokenClassification)
# transformers' Trainer shifts the labels that it smooths for the classes named here alone.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[OSDNConfig.model_type] = OSDNForCausalLM.__name__
# transformers' server looks for config.architectures among the names of the package transformers
# (cli/serving/model_manager.py of 5.24), after it has imported the file beside the checkpoint. The
# package is there twice, as its processing_utils loads it anew: so the name goes to their class.
setattr(type(transformers), OSDNForCausalLM.__name__, OSDNForCausalLM)
