"""Decoding through a captured step: one token of a whole model, replayed as one CUDA graph.

A model without attention layers keeps a memory of constant size, so one graph for each batch size
serves every position. The graph holds five launches a block (osdn/ops/triton/products.py and
layer_step.py) and reads the weights where they are. `OSDNForCausalLM.forward` comes here for the
tokens of a cache that `generate` has marked; everything around it (sampling, streamers, beams) is
transformers' own.

The states of a cache move into the graph's buffers at its first token and stay there: the cache's
layers then hold views of them, so that every other reader and writer of the cache, eager forwards
included, goes on as before. A second cache moves in by moving the first one out.
"""

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionLayer
from transformers.utils import logging

from osdn.layers.convolution import ShortConvolution
from osdn.layers.mlp import SwiGLU
from osdn.layers.osdn import OSDN, ForgettingGate
from osdn.model.block import OSDNBlock
from osdn.model.cache import OSDNCache
from osdn.model.prefill import MOST_LENGTHS, Prompt, padded
from osdn.ops.interface import HAS_TRITON, TRITON_LARGEST_HEAD

MOST_STEPS = 4  # batch sizes captured at a time for one model; the least recently used one goes
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLAIN = (OSDNBlock, OSDN, SwiGLU, ShortConvolution, ForgettingGate, nn.Linear, nn.RMSNorm,
         nn.Embedding, nn.ModuleList)  # fmt: skip

logger = logging.get_logger(__name__)


def last_logits(
    model: Any, input_ids: Tensor | None, attention_mask: Tensor | None, cache: OSDNCache
) -> Tensor | None:
    """Logits [B, 1, vocabulary] after the last of these tokens [B, T]; the cache is updated.

    One token after a past is a step; several without one are a short prompt (`prefill`). None where
    the layers must run instead: other tokens, gradients, autocast, or a model for which
    `parameters_of` gives a reason.
    """
    if (
        not isinstance(input_ids, Tensor)
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
    size = padded(B, T) if T > 1 else 1
    if size is None:
        return None
    with _lock:
        step = _step(model, cache, input_ids)
        if step is None:
            return None
        if T > 1:
            logits = step.prefill(model, size, input_ids, attention_mask)
        else:
            logits = step.run(input_ids, attention_mask)
        cache.tokens_seen += T
        return logits


def runs_on(device: torch.device) -> bool:
    """Whether a step can be captured there."""
    return device.type == "cuda" and HAS_TRITON


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
    for block in model.model.layers:
        if not isinstance(block.attn, OSDN):
            return "attention layers, whose cache grows"
        if block.attn.backend not in ("auto", "triton"):
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
            if p.dtype not in DTYPES or (p.dtype, p.device) != (first.dtype, first.device):
                return f"{name}.{own} is {p.dtype} on {p.device}"
            found.append(p)
        waiting += [(f"{name}.{own}", x) for own, x in module._modules.items() if x is not None]
    return found


class DecodingStep:
    """One token for `batch` sequences: buffers, and the launches that lead through the model.

    slabs: S [L, B, H, K, V] and d [L, B, H, K] in float32, histories [L, B, 2 H K, W−1] (q and k)
        and [L, B, H V, W−1], for L layers; the views of them are what a cache's layers hold.
    """

    def __init__(self, model: Any, parameters: list[nn.Parameter], batch: int):
        from osdn.ops.triton.products import stream_like

        mixer, config = model.model.layers[0].attn, model.config
        H, K, V = mixer.num_heads, mixer.head_dim, mixer.head_v_dim
        gap, layers = mixer.q_conv1d.kernel_size[0] - 1, len(model.model.layers)
        weight = model.lm_head.weight
        self.device, self.dtype, self.batch = weight.device, weight.dtype, batch
        self.eps = config.norm_eps
        self.embedding, self.head = model.model.embeddings.weight, weight
        self.norm = model.model.norm.weight
        self.layers = [_Layer(block) for block in model.model.layers]
        self.parameters = parameters
        self.addresses = [p.data_ptr() for p in parameters]

        float32: dict[str, Any] = {"dtype": torch.float32, "device": self.device}
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        self.slabs = (
            torch.zeros(layers, batch, H, K, V, **float32),
            torch.zeros(layers, batch, H, K, **float32),
            torch.zeros(layers, batch, 2 * H * K, gap, **like),
            torch.zeros(layers, batch, H * V, gap, **like),
        )
        self.views = [slab[i] for i in range(layers) for slab in self.slabs]
        self.owner: ref[OSDNCache] | None = None

        self.ids = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.mask = torch.ones(batch, dtype=torch.int8, device=self.device)
        self.unmasked = True
        self.hidden = stream_like(torch.zeros(batch, config.hidden_size, **like))
        self.projected = torch.zeros(batch, sum(map(len, self.layers[0].projections)), **like)
        self.mixed = torch.zeros(batch, H * V, **like)
        self.inner = torch.zeros(batch, config.intermediate_size, **like)
        self.logits = torch.zeros(batch, config.vocab_size, **like)
        self.stream = current_stream(self.device)
        self.replay: Callable[[], None] | None = None  # captured at the first token
        self.prompts: dict[int, Prompt] = {}  # by padded length

    def launch(self) -> None:
        """The kernels, in order; nothing is allocated."""
        from osdn.ops.triton.layer_step import layer_step
        from osdn.ops.triton.products import add_product, embed, gated_product, project

        stream, eps, layers = self.hidden, self.eps, self.layers
        after = [layer.attn_norm for layer in layers[1:]] + [self.norm]
        embed(self.ids, self.embedding, layers[0].attn_norm, stream)
        for i, layer in enumerate(layers):
            S, d, qk_history, v_history = self.views[4 * i : 4 * i + 4]
            project(stream, layer.attn_norm, layer.projections, self.projected, eps)
            layer_step(
                self.projected, self.mask, (qk_history, v_history), layer.convolutions,
                layer.gamma_bias, layer.o_norm, S, d, self.mixed, layer.constants,
            )  # fmt: skip
            add_product(self.mixed, layer.o_proj, layer.mlp_norm, stream)
            gated_product(stream, layer.mlp_norm, layer.gate, layer.up, self.inner, eps)
            add_product(self.inner, layer.down, after[i], stream)
        project(stream, self.norm, [self.head], self.logits, eps)

    def run(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits [B, 1, vocabulary] in a tensor of their own."""
        self._wait()
        if self.replay is None:
            self.replay = self._captured()
        self.ids.copy_(input_ids[:, 0])
        if attention_mask is not None:
            self.mask.copy_(attention_mask[:, -1])
        elif not self.unmasked:
            self.mask.fill_(1)
        self.unmasked = attention_mask is None
        self.replay()
        return self.logits[:, None].clone()

    def prefill(
        self, model: Any, size: int, input_ids: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """Logits [B, 1, vocabulary] after prompts [B, T], and their states in the buffers."""
        self._wait()
        prompt = self.prompts.pop(size, None)
        with torch.inference_mode(False), torch.no_grad():
            if prompt is None:
                while len(self.prompts) >= MOST_LENGTHS:
                    del self.prompts[next(iter(self.prompts))]
                prompt = Prompt(self.batch, size, self.device)
            self.prompts[size] = prompt

            def finish(cache: OSDNCache, hidden: Tensor) -> None:
                for view, held in zip(self.views, _tensors(cache)):
                    view.copy_(held)
                torch.mm(model.model.norm(hidden), self.head.t(), out=self.logits)

            prompt.run(model, input_ids, attention_mask, finish, capture)
        return self.logits[:, None].clone()

    def _captured(self) -> Callable[[], None]:
        """The launches as a graph; they run once before, so the states are put back after."""
        with torch.inference_mode(False), torch.no_grad():
            states = [slab.clone() for slab in self.slabs]
            replay = capture(self.launch, self.device)
            for slab, before in zip(self.slabs, states):
                slab.copy_(before)
        return replay

    def _wait(self) -> None:
        """Where the caller's stream has changed, wait for what the last one was given."""
        stream = current_stream(self.device)
        if stream is not None and stream != self.stream:
            stream.wait_stream(self.stream)
            self.stream = stream

    def serves(self, cache: OSDNCache) -> bool:
        """Whether the cache's states are these buffers, and the weights where they were."""
        if self.owner is None or self.owner() is not cache:
            return False
        held = _tensors(cache)
        return (
            len(held) == len(self.views)
            and all(a is b for a, b in zip(held, self.views))
            and self.reads(self.parameters)
        )

    def reads(self, parameters: list[nn.Parameter]) -> bool:
        """Whether these are the weights, and where they were at the capture."""
        return self.addresses == [p.data_ptr() for p in parameters]

    def adopt(self, cache: OSDNCache) -> None:
        """Move the cache's states in, and those of the cache that was here out."""
        before = None if self.owner is None else self.owner()
        if before is not None and before is not cache and before.slabs is self.slabs:
            for i, (held, view) in enumerate(zip(_tensors(before), self.views)):
                if held is view:
                    _put(before, i, view.clone())
            before.slabs = None
        if cache.tokens_seen:
            for i, (held, view) in enumerate(zip(_tensors(cache), self.views)):
                if held is not view:
                    view.copy_(held)
                    _put(cache, i, view)
        else:
            self._begin(cache)
        cache.slabs, self.owner = self.slabs, ref(cache)

    def _begin(self, cache: OSDNCache) -> None:
        """Make an empty cache's layers hold the buffers, as their first updates would."""
        for i, view in enumerate(self.views):
            _put(cache, i, view)
        for layer in cache.layers:
            assert isinstance(layer, LinearAttentionLayer)
            layer.dtype, layer.device = self.dtype, self.device
            for slot in (0, 1):
                layer.conv_kernel_size[slot] = self.slabs[2].shape[-1]
                layer.is_conv_states_initialized[slot] = True
                layer.is_recurrent_states_initialized[slot] = True
                layer.has_previous_state[slot] = True


class _Layer:
    """The weights of one block, and what its mixer fixes."""

    def __init__(self, block: OSDNBlock):
        from osdn.ops.triton.layer_step import Constants

        mixer = block.attn
        assert isinstance(mixer, OSDN)
        optional = [x for x in (mixer.a_proj, mixer.g_proj) if x is not None]
        modules = [mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.b_proj, *optional]
        self.projections = [module.weight for module in modules]
        self.convolutions = (
            mixer.q_conv1d.weight, mixer.k_conv1d.weight, mixer.v_conv1d.weight,
        )  # fmt: skip
        self.gamma_bias = None if mixer.a_proj is None else mixer.a_proj.bias
        self.attn_norm, self.mlp_norm = block.attn_norm.weight, block.mlp_norm.weight
        self.o_norm, self.o_proj = mixer.o_norm.weight, mixer.o_proj.weight
        self.gate, self.up = block.mlp.gate_proj.weight, block.mlp.up_proj.weight
        self.down = block.mlp.down_proj.weight
        eps = mixer.o_norm.eps
        assert eps is not None
        self.constants = Constants(
            mixer.num_heads, mixer.head_dim, mixer.head_v_dim, mixer.rule["eta"],
            bool(mixer.rule.get("beta_aware")), mixer.rule.get("precond_min"),
            mixer.rule.get("precond_max"), mixer.head_dim**-0.5, eps, mixer.allow_neg_eigval,
            mixer.g_proj is not None,
        )  # fmt: skip


def capture(launch: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A function that replays what `launch` does on the device as one CUDA graph.

    Runs `launch` once before, which compiles its kernels.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            launch()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            launch()
    return graph.replay


def current_stream(device: torch.device) -> Any:
    """The stream that work is queued on, or None where there are none."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _step(model: Any, cache: OSDNCache, input_ids: Tensor) -> DecodingStep | None:
    """The step that serves this cache: the one that does, or else one that adopts it, or None."""
    steps, (batch, T) = _steps.setdefault(model, {}), input_ids.shape
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
    if step is not None and not step.reads(parameters):
        steps.clear()  # weights were moved or replaced: no graph is valid any more
        step = None
    with torch.inference_mode(False), torch.no_grad():
        steps.pop(batch, None)
        if step is None:
            while len(steps) >= MOST_STEPS:
                del steps[next(iter(steps))]
            logger.info(f"generate captures its step for a batch of {batch}")
            step = DecodingStep(model, parameters, batch)
        steps[batch] = step  # last: the most recently used
        if T == 1 and [(x.shape, x.dtype, x.device) for x in _tensors(cache)] != [
            (x.shape, x.dtype, x.device) for x in step.views
        ]:  # not this model's
            cache.captured = False
            return None
        step.adopt(cache)
    return step


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


def _tensors(cache: OSDNCache) -> list[Tensor]:
    """S, d, the history of q and k, that of v, layer by layer."""
    found: list[Any] = []
    for layer in cache.layers:
        assert isinstance(layer, LinearAttentionLayer)
        found += (layer.recurrent_states[0], layer.recurrent_states[1],
                  layer.conv_states[0], layer.conv_states[1])  # fmt: skip
    return found


def _put(cache: OSDNCache, number: int, x: Tensor) -> None:
    """Make x the cache's tensor of that number in `_tensors`."""
    layer: Any = cache.layers[number // 4]
    states = layer.recurrent_states if number % 4 < 2 else layer.conv_states
    states[number % 2] = x


_lock = threading.RLock()
_steps: WeakKeyDictionary[Any, dict[int, DecodingStep]] = WeakKeyDictionary()
