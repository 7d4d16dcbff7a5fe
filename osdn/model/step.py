"""One token of a whole model for a fixed number of sequences: buffers and the launches over them.

On a GPU the launches are five a block (osdn/ops/triton/products.py and layer_step.py) and are
captured as one CUDA graph. On a CPU they are PyTorch's products and two compiled calls a block.
"""

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionLayer

from osdn.layers.osdn import OSDN
from osdn.model.block import OSDNBlock
from osdn.model.cache import OSDNCache
from osdn.model.prefill import MOST_LENGTHS, Prompt
from osdn.ops import online_scaled_delta_step
from osdn.ops.convolution import L2_EPS
from osdn.ops.layer_step import Constants


class DecodingStep:
    """One token for `batch` sequences: buffers, and the launches that lead through the model.

    slabs: S [L, B, H, K, V] and d [L, B, H, K] in float32, histories [L, B, 2 H K, W−1] (q and k)
        and [L, B, H V, W−1], for L layers; the views of them are what a cache's layers hold.
    """

    def __init__(self, model: Any, parameters: list[nn.Parameter], batch: int):
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
        # A graph holds addresses, not tensors: weights that moved make it wrong, silently.
        self.addresses = [p.data_ptr() for p in parameters]

        float32: dict[str, Any] = {"dtype": torch.float32, "device": self.device}
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        # One tensor for all layers, so that beams are reordered by one copy of each.
        self.slabs = (
            torch.zeros(layers, batch, H, K, V, **float32),
            torch.zeros(layers, batch, H, K, **float32),
            torch.zeros(layers, batch, 2 * H * K, gap, **like),
            torch.zeros(layers, batch, H * V, gap, **like),
        )
        self.views = [slab[i] for i in range(layers) for slab in self.slabs]
        self.owner: ref[OSDNCache] | None = None

        self.ids = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.mask = torch.ones(batch, dtype=torch.int64, device=self.device)
        # The mask is written only when it changes: most steps have no padding.
        self.unmasked = True
        self.kernels = captures(self.device)
        if self.kernels:
            from osdn.ops.triton.products import stream_like

            self.hidden = stream_like(torch.zeros(batch, config.hidden_size, **like))
        # [B, all projections of a layer] for each layer, in the same place
        widths = [sum(map(len, layer.projections)) for layer in self.layers]
        row = torch.zeros(batch * max(widths), **like)
        self.projected = [row[: batch * width].view(batch, width) for width in widths]
        self.mixed = torch.zeros(batch, H * V, **like)  # [B, H V]
        self.inner = torch.zeros(batch, config.intermediate_size, **like)
        self.logits = torch.zeros(batch, config.vocab_size, **like)
        self.stream = current_stream(self.device)
        self.replay: Callable[[], None] | None = None  # captured at the first token
        self.prompts: dict[int, Prompt] = {}  # by padded length

    def launch(self) -> None:
        """All of it in order; on a GPU nothing is allocated."""
        (self._launch_kernels if self.kernels else self._launch_products)()

    def _launch_kernels(self) -> None:
        from osdn.ops.triton.layer_step import layer_step
        from osdn.ops.triton.products import add_product, embed, gated_product, project

        stream, eps, layers = self.hidden, self.eps, self.layers
        # A product also takes the sum of squares for the norm that follows it.
        after = [layer.attn_norm for layer in layers[1:]] + [self.norm]
        embed(self.ids, self.embedding, layers[0].attn_norm, stream)
        for i, layer in enumerate(layers):
            # Views [B, ...] of layer i, changed in place.
            S, d, qk_history, v_history = self.views[4 * i : 4 * i + 4]
            # norm, then all projections: [B, D] [D, N]
            project(stream, layer.attn_norm, layer.projections, self.projected[i], eps)
            layer_step(
                self.projected[i], self.mask, (qk_history, v_history), layer.convolutions,
                layer.gamma_bias, layer.decay, layer.o_norm, S, d, self.mixed, layer.constants,
            )  # fmt: skip
            add_product(self.mixed, layer.o_proj, layer.mlp_norm, stream)
            gated_product(stream, layer.mlp_norm, layer.gate, layer.up, self.inner, eps)
            add_product(self.inner, layer.down, after[i], stream)
        project(stream, self.norm, [self.head], self.logits, eps)

    def _launch_products(self) -> None:
        from osdn.ops.numba.layer_step import layer_inputs

        h, eps, B = F.embedding(self.ids, self.embedding), self.eps, self.batch
        mask, none = self.mask.numpy(), h.new_empty(0)
        for i, layer in enumerate(self.layers):
            S, d, *histories = self.views[4 * i : 4 * i + 4]
            c, projected = layer.constants, self.projected[i]
            (H, K), V = d.shape[1:], c.value_size
            n, column = F.rms_norm(h, h.shape[-1:], layer.attn_norm, eps), 0  # [B, D]
            for weight in layer.projections:
                # [B, D] [D, columns], side by side in one row
                torch.mm(n, weight.t(), out=projected[:, column : column + len(weight)])
                column += len(weight)
            bias = none if layer.gamma_bias is None else layer.gamma_bias
            decay = layer.decay or (none, none)
            out = [h.new_empty(B, H, K), h.new_empty(B, H, K), h.new_empty(B, H, V)]  # q, k, v
            out += [h.new_empty(B, H) for _ in range(3)]  # β, log γ, log α
            layer_inputs(
                projected.numpy(), mask, *(_flat(x) for x in histories),
                tuple(_flat(x) for x in layer.convolutions), _flat(bias),
                tuple(_flat(x) for x in decay), L2_EPS, c.allow_neg_eigval,
                tuple(x.numpy() for x in out),
            )  # fmt: skip
            q, k, v, beta, log_gamma, log_alpha = out
            o, _, _ = online_scaled_delta_step(
                q, k, v, beta, None if layer.gamma_bias is None else log_gamma,
                log_alpha=None if layer.decay is None else log_alpha, state=S, precond=d, eta=c.eta,
                beta_aware=c.beta_aware, precond_min=c.precond_min,
                precond_max=c.precond_max, backend="numba",
            )  # fmt: skip
            o = F.rms_norm(o, (V,), layer.o_norm, c.norm_eps).flatten(1)  # [B, H, V] to [B, H V]
            if c.output_gate:
                # The gate is the last of the projections; 0 for padding, whose o has no meaning.
                o *= F.silu(projected[:, column - H * V :]) * self.mask[:, None]
            h = torch.addmm(h, o, layer.o_proj.t())
            n = F.rms_norm(h, h.shape[-1:], layer.mlp_norm, eps)
            inner = F.silu(n @ layer.gate.t()).mul_(n @ layer.up.t())  # [B, intermediate]
            h = torch.addmm(h, inner, layer.down.t())
        torch.mm(F.rms_norm(h, h.shape[-1:], self.norm, eps), self.head.t(), out=self.logits)

    def run(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits [B, 1, vocabulary] in a tensor of their own."""
        self._wait()
        if self.replay is None:
            self.replay = self._captured() if self.kernels else self.launch
        self.ids.copy_(input_ids[:, 0])
        if attention_mask is not None:
            self.mask.copy_(attention_mask[:, -1])
        elif not self.unmasked:
            self.mask.fill_(1)
        self.unmasked = attention_mask is None
        self.replay()
        return self.logits[:, None].clone()

    def prefill(self, model: Any, size: int, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Logits [B, 1, vocabulary] after prompts [B, T], and their states in the buffers.

        size: what they are padded to.  mask: [B, T] booleans, or None without padding.
        """
        self._wait()
        prompt = self.prompts.pop(size, None)
        with torch.inference_mode(False), torch.no_grad():
            if prompt is None:
                while len(self.prompts) >= MOST_LENGTHS:
                    del self.prompts[next(iter(self.prompts))]
                prompt = Prompt(self.batch, size, self.device)
            self.prompts[size] = prompt

            prompt.run(model, input_ids, mask, self.views, self.logits, capture)
        return self.logits[:, None].clone()

    def compile(self, model: Any, length: int) -> None:
        """Compile the kernels of a token and of a prompt of `length` tokens, all at once.

        The buffers hold nothing yet; what they hold afterwards is of no use.
        """
        from osdn.ops.triton.ahead import compile_together

        prompt = Prompt(self.batch, length, self.device)

        def launch() -> None:
            prompt.launch(model, self.views, self.logits)
            self.launch()

        compile_together(launch)

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
        held = tensors_of(cache)
        return (
            len(held) == len(self.views)
            and all(a is b for a, b in zip(held, self.views))
            and self.reads(self.parameters)
        )

    def reads(self, parameters: list[nn.Parameter]) -> bool:
        """Whether these are the weights, and where they were at the capture."""
        return self.addresses == [p.data_ptr() for p in parameters]

    def computes(self, model: Any) -> bool:
        """Whether the layers' rules are those that the launches were made for."""
        return [x.constants for x in self.layers] == [
            constants_of(block.attn) for block in model.model.layers
        ]

    def adopt(self, cache: OSDNCache) -> None:
        """Move the cache's states in, and those of the cache that was here out."""
        before = None if self.owner is None else self.owner()
        if before is not None and before is not cache and before.slabs is self.slabs:
            for i, (held, view) in enumerate(zip(tensors_of(before), self.views)):
                if held is view:
                    put(before, i, view.clone())
            before.slabs = None
        if cache.tokens_seen:
            for i, (held, view) in enumerate(zip(tensors_of(cache), self.views)):
                if held is not view:
                    view.copy_(held)
                    put(cache, i, view)
        else:
            self._begin(cache)
        cache.slabs, self.owner = self.slabs, ref(cache)

    def _begin(self, cache: OSDNCache) -> None:
        """Make an empty cache's layers hold the buffers, as their first updates would."""
        for i, view in enumerate(self.views):
            put(cache, i, view)
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
        mixer = block.attn
        assert isinstance(mixer, OSDN)
        optional = [x for x in (mixer.gamma_proj, mixer.a_proj, mixer.g_proj) if x is not None]
        modules = [mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.b_proj, *optional]
        self.projections = [module.weight for module in modules]
        self.convolutions = (
            mixer.q_conv1d.weight, mixer.k_conv1d.weight, mixer.v_conv1d.weight,
        )  # fmt: skip
        self.gamma_bias = None if mixer.gamma_proj is None else mixer.gamma_proj.bias
        self.decay = None
        if mixer.A_log is not None and mixer.dt_bias is not None:
            self.decay = (mixer.A_log, mixer.dt_bias)
        self.attn_norm, self.mlp_norm = block.attn_norm.weight, block.mlp_norm.weight
        self.o_norm, self.o_proj = mixer.o_norm.weight, mixer.o_proj.weight
        self.gate, self.up = block.mlp.gate_proj.weight, block.mlp.up_proj.weight
        self.down = block.mlp.down_proj.weight
        self.constants = constants_of(mixer)


def constants_of(mixer: OSDN) -> Constants:
    """What a layer says of its rule and sizes now."""
    eps = mixer.o_norm.eps
    assert eps is not None
    return Constants(
        mixer.num_heads, mixer.head_dim, mixer.head_v_dim, mixer.rule["eta"],
        bool(mixer.rule.get("beta_aware")), mixer.rule.get("precond_min"),
        mixer.rule.get("precond_max"), mixer.head_dim**-0.5, eps, mixer.allow_neg_eigval,
        mixer.g_proj is not None,
    )  # fmt: skip


def captures(device: torch.device) -> bool:
    """Whether a step there is made of the Triton kernels and replayed as a graph."""
    return device.type == "cuda"


def _flat(x: Tensor) -> Any:
    """A view as numba takes it."""
    return x.detach().numpy().reshape(-1)


def capture(launch: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A function that replays what `launch` does on the device as one CUDA graph.

    Runs `launch` once before, which compiles its kernels. `launch` itself where it is a CPU.
    """
    if device.type != "cuda":
        return launch
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


def tensors_of(cache: OSDNCache) -> list[Tensor]:
    """S, d, the history of q and k, that of v, layer by layer."""
    found: list[Any] = []
    for layer in cache.layers:
        assert isinstance(layer, LinearAttentionLayer)
        found += (layer.recurrent_states[0], layer.recurrent_states[1],
                  layer.conv_states[0], layer.conv_states[1])  # fmt: skip
    return found


def put(cache: OSDNCache, number: int, x: Tensor) -> None:
    """Make x the cache's tensor of that number in `tensors_of`."""
    layer: Any = cache.layers[number // 4]
    states = layer.recurrent_states if number % 4 < 2 else layer.conv_states
    states[number % 2] = x
