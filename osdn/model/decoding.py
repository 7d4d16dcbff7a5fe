"""Decoding through one step of the whole model, where nothing about a model forbids it.

A model without attention layers keeps a memory of constant size, so one step for each batch size
serves every position; on a GPU it is a captured graph (osdn/model/step.py). Short prompts have
graphs of their own (osdn/model/prefill.py). `OSDNForCausalLM.forward` comes here for the tokens of
a cache that `generate` has marked; everything around it (sampling, streamers, beams) is
transformers' own.

The states of a cache move into the step's buffers at its first token and stay there: the cache's
layers then hold views of them, so that every other reader and writer of the cache, eager forwards
included, goes on as before. A second cache moves in by moving the first one out.
"""

import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.utils import logging

from osdn.layers.convolution import ShortConvolution
from osdn.layers.gates import ForgettingGate
from osdn.layers.mlp import SwiGLU
from osdn.layers.osdn import OSDN
from osdn.model.block import OSDNBlock
from osdn.model.cache import OSDNCache
from osdn.model.prefill import MOST_TOKENS, SHORTEST, padded, prompt_mask
from osdn.model.step import DecodingStep, captures, tensors_of
from osdn.ops.interface import HAS_NUMBA, HAS_TRITON, TRITON_LARGEST_HEAD

MOST_STEPS = 4  # batch sizes captured at a time for one model; the least recently used one goes
DTYPES = {"cuda": (torch.bfloat16, torch.float16, torch.float32), "cpu": (torch.float32,)}
BACKENDS = {"cuda": "triton", "cpu": "numba"}
PLAIN = (OSDNBlock, OSDN, SwiGLU, ShortConvolution, ForgettingGate, nn.Linear, nn.RMSNorm,
         nn.Embedding, nn.ModuleList)  # fmt: skip

logger = logging.get_logger(__name__)


def last_logits(
    model: Any,
    cache: Cache | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    *,
    use_cache: bool | None,
    logits_to_keep: int | Tensor,
    others: Sequence[Any],
) -> Tensor | None:
    """Logits [B, 1, vocabulary] after the last of these tokens [B, T]; the cache is updated.

    One token after a past is a step; several without one are a short prompt (`prefill`). None where
    the layers must run instead: a cache that `generate` has not marked, more asked for than these
    logits, other tokens, gradients, autocast, or a model for which `parameters_of` gives a reason.

    Args:
        others: what else the forward was given; None or False is nothing.
    """
    config = model.config
    if (
        # Cheap questions first: this is asked at every token.
        not isinstance(cache, OSDNCache)
        or not cache.captured
        or not (config.use_cache if use_cache is None else use_cache)
        or config.output_hidden_states
        or not all(x is None or x is False for x in others)
        or not isinstance(logits_to_keep, int)
        or not isinstance(input_ids, Tensor)
        or input_ids.ndim != 2
        or not input_ids.numel()
        or not runs_on(input_ids.device)
        or torch.is_grad_enabled()
        or model.training
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled(input_ids.device.type)
        or not (attention_mask is None or _fits(attention_mask, input_ids))
    ):
        return None
    B, T = input_ids.shape
    if T > 1 and logits_to_keep != 1:
        return None
    size = 1 if T == 1 else padded(B, T)
    if T > 1 and not captures(input_ids.device):
        return None
    if size is None:  # a long prompt keeps a GPU busy by itself and gains nothing
        with _lock:
            _compile_ahead(model, cache, B)
        return None
    mask = prompt_mask(input_ids, attention_mask) if T > 1 else attention_mask
    if isinstance(mask, bool):
        return None
    # Buffers belong to one cache at a time, and generate may run in several threads.
    with _lock:
        step = _step(model, cache, input_ids)
        if step is None:
            return None
        if T > 1:
            logits = step.prefill(model, size, input_ids, mask)
        else:
            logits = step.run(input_ids, mask)
        cache.tokens_seen += T
        return logits


def runs_on(device: torch.device) -> bool:
    """Whether there are compiled steps for that device."""
    return HAS_TRITON if device.type == "cuda" else HAS_NUMBA and device.type == "cpu"


def _fits(attention_mask: Tensor, input_ids: Tensor) -> bool:
    """Whether the mask is [B, at least T]; if not, the layers raise."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return False
    (B, T), (rows, columns) = input_ids.shape, attention_mask.shape
    return rows == B and columns >= T


def parameters_of(model: Any) -> list[nn.Parameter] | str:
    """The parameters that a step reads, or why this model cannot be captured.

    Asked once for each cache; walks the modules itself, as `named_modules` takes a millisecond.
    """
    first, found = model.lm_head.weight, []
    if not runs_on(first.device):
        return f"weights on {first.device}"
    allowed = DTYPES[first.device.type]
    for block in model.model.layers:
        if not isinstance(block.attn, OSDN):
            return "attention layers, whose cache grows"
        if block.attn.backend not in ("auto", BACKENDS[first.device.type]):
            return f"a layer with backend {block.attn.backend!r}"
        if max(block.attn.head_dim, block.attn.head_v_dim) > TRITON_LARGEST_HEAD:
            return f"heads larger than {TRITON_LARGEST_HEAD}"
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module is not model:  # its own hooks run around us
            if module is not model.model and type(module) not in PLAIN:
                return f"{name} is a {type(module).__name__}, not a plain layer"
            if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                return f"hooks on {name}"
            if type(module) is nn.Linear and module.bias is not None:
                return f"a bias in {name}"
        for own, p in module._parameters.items():
            if p is None:
                continue
            if type(p) is not nn.Parameter or not p.is_contiguous():
                return f"{name}.{own} is not a plain contiguous parameter"
            if (p.dtype, p.device) != (first.dtype, first.device) or p.dtype not in allowed:
                return f"{name}.{own} is {p.dtype} on {p.device}"
            found.append(p)
        waiting += [(f"{name}.{own}", x) for own, x in module._modules.items() if x is not None]
    return found


def _step(model: Any, cache: OSDNCache, input_ids: Tensor) -> DecodingStep | None:
    """The step that serves this cache: the one that does, or else one that adopts it, or None."""
    steps, (batch, T) = captured_steps.setdefault(model, {}), input_ids.shape
    step = steps.get(batch)
    if T == 1 and step is not None and step.serves(cache):
        return step
    if not (_is_empty(cache) if T > 1 else _has_past(cache, batch)):
        return None
    parameters = parameters_of(model)
    if isinstance(parameters, str):
        logger.info(f"generate decodes without a captured step: {parameters}")
        cache.captured = False
        return None
    if input_ids.device != model.lm_head.weight.device:
        return None
    if step is not None and not (step.reads(parameters) and step.computes(model)):
        steps.clear()  # weights were moved or replaced, or a rule changed: no graph is valid
        step = None
    with torch.inference_mode(False), torch.no_grad():
        steps.pop(batch, None)
        if step is None:
            step = _made(model, parameters, batch, padded(batch, T) or SHORTEST)
        steps[batch] = step  # last: the most recently used
        if T == 1 and [(x.shape, x.dtype, x.device) for x in tensors_of(cache)] != [
            (x.shape, x.dtype, x.device) for x in step.views
        ]:  # not this model's
            cache.captured = False
            return None
        step.adopt(cache)
    return step


def _made(model: Any, parameters: list[nn.Parameter], batch: int, length: int) -> DecodingStep:
    """A new step, whose kernels and those of a prompt of `length` tokens are compiled."""
    steps = captured_steps[model]
    while len(steps) >= MOST_STEPS:
        del steps[next(iter(steps))]
    logger.info(f"generate compiles and captures its step for a batch of {batch}")
    step = DecodingStep(model, parameters, batch)
    if step.kernels:
        step.compile(model, length)
    return step


def _compile_ahead(model: Any, cache: OSDNCache, batch: int) -> None:
    """Before the layers take a model's first prompt, which would compile one after the other."""
    steps = captured_steps.setdefault(model, {})
    if steps or not _is_empty(cache) or isinstance(parameters := parameters_of(model), str):
        return
    with torch.inference_mode(False), torch.no_grad():
        steps[batch] = _made(model, parameters, batch, max(SHORTEST, MOST_TOKENS // batch))


def _is_empty(cache: OSDNCache) -> bool:
    """Whether no layer has had a token yet."""
    return cache.tokens_seen == 0 and all(
        isinstance(layer, LinearAttentionLayer)
        and not any(layer.is_conv_states_initialized.values())
        and not layer.record_past
        for layer in cache.layers
    )


def _has_past(cache: OSDNCache, batch: int) -> bool:
    """Whether every layer has states of that many sequences, as a first forward leaves them."""
    for layer in cache.layers:
        if (
            not isinstance(layer, LinearAttentionLayer)
            or not layer.has_previous_state[0]
            or layer.record_past
            or layer.recurrent_states[0] is None
            or len(layer.recurrent_states[0]) != batch
        ):
            return False
    return len(cache.layers) > 0


_lock = threading.RLock()
captured_steps: WeakKeyDictionary[Any, dict[int, DecodingStep]] = WeakKeyDictionary()
