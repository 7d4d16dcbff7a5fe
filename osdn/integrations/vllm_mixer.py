"""The OSDN layer in vLLM's engine: one flat batch of tokens, states in pages.

A page holds what one request's layer remembers after some token: the memory S [H, K, V] and the
preconditioner d [H, K] in float32, and the convolutions' histories of q and k together and of v,
[D, W − 1] in the weights' dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from osdn.integrations.vllm_batch import PagedBackend
from osdn.layers.osdn import OSDN
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

    def get_attn_backend(self) -> type[PagedBackend]:
        return PagedBackend

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
            pages = batch.state_indices_tensor_d  # [requests, 1 + drafts]
            if batch.query_start_loc_d is None:  # one token a request, more where a graph pads them
                page = pages[:, 0]
                output[: len(page)] = self._step(hidden_states[: len(page)], page, page)
            else:
                output[:decoded] = self._verify(
                    hidden_states[:decoded],
                    batch.query_start_loc_d,
                    pages,
                    batch.num_accepted_tokens,
                )
        if batch.num_prefills:
            places: Any = slice(decoded, decoded + batch.num_prefill_tokens)
            offsets = batch.query_start_loc_p
            if batch.prompt_tokens is not None:
                places, offsets = batch.prompt_tokens, batch.prompt_offsets
            output[places] = self._run(
                hidden_states[places],
                offsets,
                batch.state_indices_tensor_p,
                batch.has_initial_states_p,
            )

    def _verify(
        self, hidden_states: Tensor, cu_seqlens: Tensor, pages: Tensor, accepted: Tensor
    ) -> Tensor:
        """Every decoding request's token and the drafts after it [tokens, D], one after another.

        Token i of a request leaves its state in pages[request, i], since only the next step knows
        how many drafts are right: accepted [requests] of the last step's tokens were, and this
        step starts from the page that the last of them wrote.
        """
        starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
        first = (accepted.long() - 1).clamp(min=0)  # 0 accepted: a piece of a prompt came before
        read = pages.gather(1, first[:, None])[:, 0]
        made = []
        for i in range(pages.shape[1]):
            there = i < lengths
            token = (starts + i).clamp(max=len(hidden_states) - 1)
            write = pages[:, i]
            read = torch.where(there, read, EMPTY_PAGE)
            made.append(
                self._step(hidden_states[token], read, torch.where(there, write, EMPTY_PAGE))
            )
            read = write
        place = torch.arange(len(hidden_states), device=cu_seqlens.device)
        request = torch.bucketize(place, cu_seqlens[1:], right=True)
        return torch.stack(made)[place - starts[request], request]

    def _step(self, hidden_states: Tensor, read: Tensor, write: Tensor) -> Tensor:
        """One token of every request [requests, D], from the state in its page `read` to `write`.

        Requests whose pages are EMPTY_PAGE are none; their output has no meaning.
        """
        cu_seqlens = torch.arange(len(read) + 1, device=read.device)
        q, k, v = self._convolve_pages(hidden_states, cu_seqlens, self._histories(read), write)
        beta, log_gamma, log_alpha = self.gates(hidden_states)
        S, d = self.kv_cache[:2]
        o, _, _ = online_scaled_delta_step(
            q, k, v, beta, log_gamma, log_alpha=log_alpha, state=S, precond=d,
            slots=torch.where(read == EMPTY_PAGE, -1, read),
            write_slots=torch.where(write == EMPTY_PAGE, -1, write),
            backend=self.backend, **self.rule,
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
        befores: list[Tensor | None] = [None] * 3
        if pages is not None and has_past is not None:
            befores = [torch.where(has_past[:, None, None], x, 0.0) for x in self._histories(pages)]
        q, k, v = self._convolve_pages(hidden_states, cu_seqlens, befores, pages)
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

    def _histories(self, pages: Tensor) -> list[Tensor]:
        """Of q, k and v, each [requests, features, W − 1]."""
        qk, v = (history[pages.long()] for history in self.kv_cache[2:])
        return [*qk.chunk(2, dim=1), v]

    def _convolve_pages(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        befores: Sequence[Tensor | None],
        pages: Tensor | None,
    ) -> list[Tensor]:
        """q, k [tokens, H, K] of unit length and v [tokens, H, V]; pages get the new histories.

        befores: the histories of q, k and v; None is of zeros.
        """
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
            at = pages.long()
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
