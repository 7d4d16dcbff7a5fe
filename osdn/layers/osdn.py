"""The OSDN token mixer.

A mixer maps hidden states [B, T, D] to [B, T, D] and keeps what it must remember between calls in a
transformers `Cache`: forward(hidden_states, attention_mask, past_key_values, use_cache, cu_seqlens)
-> (output, None, past_key_values), the signature of flash-linear-attention's layers.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from osdn.layers.cache import Mixed, linear_cache, token_mask
from osdn.layers.convolution import ShortConvolution, last_inputs
from osdn.layers.padding import padding_first, reordered
from osdn.layers.sizes import head_size
from osdn.ops import online_scaled_delta_rule, online_scaled_delta_step
from osdn.ops.convolution import short_convolutions
from osdn.ops.packing import check_cu_seqlens
from osdn.ops.validation import check_box_holds_one, check_rule, check_sizes

Forgetting = Literal["none", "data"]

# Columns of a joint product are a multiple of this, 128 bytes in bfloat16: for the matrix units, and
# because torch.compile would otherwise copy it into rows that are (its comprehensive_padding).
ALIGNED = 64
APF_BIAS = 6.9  # γ = sigmoid(6.9) ≈ 0.999 at the start


class ForgettingGate(nn.Linear):
    """W_a x + b_a [B, T, H], in float32 or wider; log γ is its logsigmoid. γ starts near 0.999."""

    def reset_special_parameters(self) -> None:
        """The initial values that are not a matter of taste: 0, and 6.9."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, APF_BIAS)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.biased(F.linear(x, self.weight.to(x.dtype)))

    def biased(self, product: Tensor) -> Tensor:
        """W_a x + b_a from W_a x; widened first, since 6.9 + x shall keep x's digits."""
        return widened(product) + self.bias.to(torch.promote_types(product.dtype, torch.float32))


class LayerOperands(NamedTuple):
    """What a layer hands to the operator, and what its convolutions hand to their next call.

    q, k: [B, T, H, K], of unit length.  v: [B, T, H, V].
    beta, log_gamma: [B, T, H] in float32 (float64 for float64 input); no log_gamma: γ = 1.
    initial_state: [B, H, K, V], None for 0.  initial_precond: [H, K] or [B, H, K], None for 1.
    history: the last W−1 inputs of the convolutions of q, k and v, each [B, features, W−1].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_gamma: Tensor | None
    initial_state: Tensor | None
    initial_precond: Tensor | None
    history: list[Tensor]


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class OSDN(nn.Module):
    """Online Scaled DeltaNet as a token mixer (arXiv 2605.13473); DeltaNet with adaptive=False.

    q, k, v = short convolutions of linear projections, q and k of unit length per head;
    β = sigmoid(W_b x); log γ = logsigmoid(W_a x) with forgetting="data" (APF), else 0;
    o = rmsnorm(online_scaled_delta_rule(q, k, v, β, log γ)) per head, optionally ⊙ silu(W_g x);
    y = W_o o.

    Args:
        hidden_size: D.  num_heads: H.
        head_dim: K, None means hidden_size // num_heads.  head_v_dim: V, None means K.
        adaptive: learn the preconditioner online; False fixes it at 1, which is DeltaNet.
        forgetting: "none" (γ = 1) or "data" (Adaptive Preconditioner Forgetting).
        eta: step size η of the preconditioner, in [0, 2].
        beta_aware: let the hypergradient see the token's own β.
        precond_min, precond_max: the box for d; both or neither.
        learn_initial_precond: d_1 is a parameter [H, K] starting at 1, else fixed at 1.
        allow_neg_eigval: β = 2 sigmoid(·), so that a write may overshoot.
        use_output_gate: multiply the normed output by silu(W_g x).
        conv_size: convolutions' width.  norm_eps: of the output norm.  layer_idx: place in a cache.

    The parameters shared with flash-linear-attention's DeltaNet have its names. Attribute
    `backend` ("auto") picks the operator's backend.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        head_v_dim: int | None = None,
        adaptive: bool = True,
        forgetting: Forgetting = "none",
        eta: float = 1.0,
        beta_aware: bool = False,
        precond_min: float | None = None,
        precond_max: float | None = None,
        learn_initial_precond: bool = True,
        allow_neg_eigval: bool = False,
        use_output_gate: bool = False,
        conv_size: int = 4,
        norm_eps: float = 1e-6,
        layer_idx: int | None = None,
    ):
        super().__init__()
        if forgetting not in ("none", "data"):
            raise ValueError(f"forgetting: expected 'none' or 'data', got {forgetting!r}")
        check_rule(eta, precond_min, precond_max, beta_aware)
        check_sizes(head_v_dim=head_v_dim, conv_size=conv_size)
        check_box_holds_one(precond_min, precond_max)
        self.num_heads, self.layer_idx, self.backend = num_heads, layer_idx, "auto"
        self.head_dim = head_size(hidden_size, num_heads, head_dim)
        self.head_v_dim = self.head_dim if head_v_dim is None else head_v_dim
        self.adaptive, self.allow_neg_eigval = adaptive, allow_neg_eigval
        box = {"precond_min": precond_min, "precond_max": precond_max}
        method: dict[str, Any] = {"eta": eta, "beta_aware": beta_aware, **box}
        self.rule = method if adaptive else {"eta": 0.0}

        key_size, value_size = num_heads * self.head_dim, num_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, key_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_size, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.q_conv1d = ShortConvolution(key_size, conv_size, self.head_dim)
        self.k_conv1d = ShortConvolution(key_size, conv_size, self.head_dim)
        self.v_conv1d = ShortConvolution(value_size, conv_size)
        self.a_proj = self.g_proj = self.initial_precond = None
        if adaptive and forgetting == "data":
            self.a_proj = ForgettingGate(hidden_size, num_heads)
        if adaptive and learn_initial_precond:
            self.initial_precond = nn.Parameter(torch.empty(num_heads, self.head_dim))
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, value_size, bias=False)
        self.o_norm = nn.RMSNorm(self.head_v_dim, eps=norm_eps)
        self.o_proj = nn.Linear(value_size, hidden_size, bias=False)
        self.reset_special_parameters()

    def reset_special_parameters(self) -> None:
        """The initial values that are not a matter of taste: d_1 = 1 and γ ≈ 0.999 everywhere."""
        if self.initial_precond is not None:
            nn.init.ones_(self.initial_precond)
        if self.a_proj is not None:
            self.a_proj.reset_special_parameters()

    @property
    def state_size(self) -> int:
        """Numbers that a sequence's memory holds: H (K V + K)."""
        return self.num_heads * self.head_dim * (self.head_v_dim + 1)

    def start_precond(self) -> Tensor | None:
        """d_1 [H, K], or None for 1; in the box, where else a first token, if padding, put it."""
        d, low, high = self.initial_precond, *map(self.rule.get, ("precond_min", "precond_max"))
        return d if d is None or low is None else d.clamp(low, high)

    def gates(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """(β, log γ), each [B, T, H] in float32 or wider; log γ is None without forgetting."""
        logits = None if self.a_proj is None else self.a_proj(hidden_states)
        return self._gates(self.b_proj(hidden_states), logits)

    def _gates(self, b: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(β, log γ) from the logits of both."""
        beta = widened(b).sigmoid() * (2 if self.allow_neg_eigval else 1)
        return beta, None if a is None else F.logsigmoid(a)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Mixed:
        """hidden_states [B, T, D] -> (output [B, T, D], None, past_key_values).

        attention_mask: [B, T] (or longer, its last T columns count), 0 where a token is padding,
            anywhere in a row. Real tokens get what they get in a row without padding.
        past_key_values: a transformers cache whose layer `layer_idx` is a linear-attention one
            with two state slots; read if it holds a past, written if use_cache.
        cu_seqlens: [N + 1] offsets of sequences packed along T; B must be 1.
        """
        if cu_seqlens is not None:  # the convolutions come before the operator and its own check
            check_cu_seqlens(cu_seqlens, hidden_states, "hidden_states")
        cache = linear_cache(past_key_values, self.layer_idx, cu_seqlens)
        mask, order = token_mask(attention_mask, hidden_states), None
        if mask is not None:
            if mask.shape[1] > 1:
                order = padding_first(mask, cu_seqlens)
                hidden_states, mask = reordered(hidden_states, order), reordered(mask, order)
            hidden_states = hidden_states.masked_fill(~mask[..., None], 0)
        given = self.operands(hidden_states, mask, cache, cu_seqlens)

        state, precond = given.initial_state, given.initial_precond
        if state is not None and precond is not None and torch.is_grad_enabled():
            state, precond = state.clone(), precond.clone()  # the cache is written over, in place
        decode = use_cache and hidden_states.shape[1] == 1 and not torch.is_grad_enabled()
        if decode and state is not None and precond is not None:
            q, k, v, beta, log_gamma = (None if x is None else x.squeeze(1) for x in given[:5])
            assert q is not None and k is not None and v is not None and beta is not None
            o, state, precond = online_scaled_delta_step(  # in place, in the cache's own tensors
                q, k, v, beta, log_gamma, state=state, precond=precond, backend=self.backend,
                **self.rule,
            )  # fmt: skip
            o = o.unsqueeze(1)
        else:
            o, state, precond = online_scaled_delta_rule(
                *given[:5], initial_state=state, initial_precond=precond,
                output_final_state=use_cache, cu_seqlens=cu_seqlens, backend=self.backend,
                **self.rule,
            )  # fmt: skip
            if cache is not None and state is not None and precond is not None:
                cache.update_recurrent_state(state, state_idx=0)
                cache.update_recurrent_state(precond, state_idx=1)
        if use_cache and cache is not None:
            cache.update_conv_state(torch.cat(given.history[:2], dim=1), state_idx=0)
            cache.update_conv_state(given.history[2], state_idx=1)

        o = self.o_norm(o.to(self.o_norm.weight.dtype)).flatten(-2).to(hidden_states.dtype)
        gate = 1.0 if self.g_proj is None else F.silu(self.g_proj(hidden_states))
        y = self.o_proj(o * gate)
        return y if order is None else reordered(y, order.argsort(1)), None, past_key_values

    def operands(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        cache: LinearAttentionLayer | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> LayerOperands:
        """The first half of forward: what it hands to the operator for hidden_states [B, T, D].

        mask: [B, T] booleans, False for padding, which stands before the real tokens of its row
            and is 0 in hidden_states.
        cache: this layer's part of a cache; what it holds comes first.
        """
        if cache is not None and not cache.has_previous_state[0]:
            cache = None
        padding = None if mask is None else (~mask).sum(1)
        if self.training and cache is None and self._is_plain():
            (q, k, v), history, (beta, log_gamma) = self._jointly(hidden_states, cu_seqlens)
        else:
            (q, k, v), history = self._convolve(hidden_states, cache, cu_seqlens, padding)
            beta, log_gamma = self.gates(hidden_states)
        if mask is not None:  # a token that writes nothing and forgets nothing
            k, beta = k * mask[..., None, None], beta * mask[..., None]
            log_gamma = None if log_gamma is None else log_gamma * mask[..., None]
        state, precond = None, self.start_precond()
        if cache is not None:
            state, precond = cache.recurrent_states[0], cache.recurrent_states[1]
        return LayerOperands(q, k, v, beta, log_gamma, state, precond, history)

    def _convolve(
        self,
        hidden_states: Tensor,
        cache: LinearAttentionLayer | None,
        cu_seqlens: Tensor | None,
        padding: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """q, k [B, T, H, K] of unit length and v [B, T, H, V], and the next history of each.

        The cache holds the history of q and k in slot 0, that of v in slot 1.
        """
        before: list[Tensor | None] = [None] * 3
        if cache is not None:
            qk, value = cache.conv_states[0], cache.conv_states[1]
            assert qk is not None
            before = [*qk.chunk(2, dim=1), value]
        made, after = [], []
        for projection, convolution, history in zip(
            (self.q_proj, self.k_proj, self.v_proj),
            (self.q_conv1d, self.k_conv1d, self.v_conv1d),
            before,
        ):
            x, history = convolution(projection(hidden_states), history, cu_seqlens, padding)
            made.append(x.unflatten(-1, (self.num_heads, -1)))
            after.append(history)
        return made, after

    def _is_plain(self) -> bool:
        """Whether the projections and convolutions are their weights alone: not replaced by an
        adapter's or a quantised layer, and nobody watches their calls."""
        watched = [self.q_proj, self.k_proj, self.v_proj, self.b_proj]
        watched += [self.q_conv1d, self.k_conv1d, self.v_conv1d]
        watched += [] if self.a_proj is None else [self.a_proj]
        return all(
            type(module) in (nn.Linear, ShortConvolution, ForgettingGate)
            and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
            and not (module._backward_pre_hooks or "forward" in module.__dict__)
            and (module.bias is None or module is self.a_proj)
            for module in watched
        )

    def _jointly(
        self, hidden_states: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, Tensor | None]]:
        """As `_convolve` and `gates` without a cache, by one product and one operator.

        In training. A GPU takes nearly as long for a product with the few columns of β and γ as for
        reading its input, three times with the backward; and the gradients of an input of several
        products must be added up in memory. The weights are joined at every call, which moves less
        than a row of tokens for each row of weights.
        """
        D, convolutions = hidden_states.shape[-1], (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        weights = [self.q_proj.weight, self.k_proj.weight, self.v_proj.weight, self.b_proj.weight]
        if self.a_proj is not None:
            weights.append(self.a_proj.weight.to(weights[0].dtype))
        if missing := -sum(map(len, weights)) % ALIGNED:
            weights.append(weights[0].new_zeros(missing, D))
        x = F.linear(hidden_states, torch.cat(weights))
        *made, logits = short_convolutions(
            x,
            [convolution.weight.squeeze(1) for convolution in convolutions],
            cu_seqlens,
            head_dims=[convolution.head_dim for convolution in convolutions],
        )
        made = [one.unflatten(-1, (self.num_heads, -1)) for one in made]
        inputs = x.split([*map(len, weights[:3]), logits.shape[-1]], dim=-1)[:3]
        history = [last_inputs(one, convolutions[0].kernel_size[0] - 1) for one in inputs]
        H = self.num_heads
        a = None if self.a_proj is None else self.a_proj.biased(logits[..., H : 2 * H])
        return made, history, self._gates(logits[..., :H], a)
