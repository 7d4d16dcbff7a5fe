"""The OSDN token mixer.

A mixer maps hidden states [B, T, D] to [B, T, D] and keeps what it must remember between calls in a
transformers `Cache`: forward(hidden_states, attention_mask, past_key_values, use_cache, cu_seqlens)
-> (output, None, past_key_values), the signature of flash-linear-attention's layers.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from osdn.layers.cache import Mixed, linear_cache, token_mask
from osdn.layers.convolution import ShortConvolution, last_inputs
from osdn.layers.gates import (
    Forgetting,
    ForgettingGate,
    StateDecay,
    rename_former,
    start_decay,
    widened,
)
from osdn.layers.padding import padding_first, reordered
from osdn.layers.sizes import head_size
from osdn.ops import online_scaled_delta_rule, online_scaled_delta_step
from osdn.ops.convolution import short_convolutions
from osdn.ops.packing import check_cu_seqlens
from osdn.ops.validation import check_box_holds_one, check_rule, check_sizes

# Columns of a joint product are a multiple of this, 128 bytes in bfloat16: the matrix units want
# it, and torch.compile gives wide tensors such rows and would copy others for our operator.
ALIGNED = 64


class LayerOperands(NamedTuple):
    """What a layer hands to the operator, and what its convolutions hand to their next call.

    q, k: [B, T, H, K], of unit length.  v: [B, T, H, V].
    beta, log_gamma, log_alpha: [B, T, H] in float32 (float64 for float64 input); None: γ or α = 1.
    initial_state: [B, H, K, V], None for 0.  initial_precond: [H, K] or [B, H, K], None for 1.
    history: the last W−1 inputs of the convolutions of q, k and v, each [B, features, W−1].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_gamma: Tensor | None
    log_alpha: Tensor | None
    initial_state: Tensor | None
    initial_precond: Tensor | None
    history: list[Tensor]


class OSDN(nn.Module):
    """Online Scaled DeltaNet as a token mixer (arXiv 2605.13473); DeltaNet with adaptive=False.

    q, k, v = short convolutions of linear projections, q and k of unit length per head;
    β = sigmoid(W_b x); log γ = logsigmoid(W_γ x + b_γ) with forgetting="data" (APF), else 0;
    log α = −exp(A_log) softplus(W_a x + dt_bias) with state_decay="data", else 0;
    o = rmsnorm(online_scaled_delta_rule(q, k, v, β, log γ, log α)) per head, optionally
    ⊙ silu(W_g x); y = W_o o.

    With adaptive=False, state_decay="data" and the output gate it is Gated DeltaNet
    (arXiv 2412.06464).

    Args:
        hidden_size: D.  num_heads: H.
        head_dim: K, None means hidden_size // num_heads.  head_v_dim: V, None means K.
        adaptive: learn the preconditioner online; False fixes it at 1, which is DeltaNet.
        forgetting: "none" (γ = 1) or "data" (Adaptive Preconditioner Forgetting).
        state_decay: "none" (α = 1) or "data": the memory decays as in Gated DeltaNet.
        eta: step size η of the preconditioner, in [0, 2].
        beta_aware: let the hypergradient see the token's own β.
        precond_min, precond_max: the box for d; both or neither.
        learn_initial_precond: d_1 is a parameter [H, K] starting at 1, else fixed at 1.
        allow_neg_eigval: β = 2 sigmoid(·), so that a write may overshoot.
        use_output_gate: multiply the normed output by silu(W_g x).
        conv_size: convolutions' width.  norm_eps: of the output norm.  layer_idx: place in a cache.

    The parameters shared with flash-linear-attention's DeltaNet and GatedDeltaNet have their names.
    Attribute `backend` ("auto") picks the operator's backend.
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
        state_decay: StateDecay = "none",
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
        if state_decay not in ("none", "data"):
            raise ValueError(f"state_decay: expected 'none' or 'data', got {state_decay!r}")
        # A layer checks what the operator would: an error at construction names the field.
        check_rule(eta, precond_min, precond_max, beta_aware)
        check_sizes(head_v_dim=head_v_dim, conv_size=conv_size)
        check_box_holds_one(precond_min, precond_max)
        self.num_heads, self.layer_idx, self.backend = num_heads, layer_idx, "auto"
        self.head_dim = head_size(hidden_size, num_heads, head_dim)
        self.head_v_dim = self.head_dim if head_v_dim is None else head_v_dim
        self.adaptive, self.allow_neg_eigval = adaptive, allow_neg_eigval
        box = {"precond_min": precond_min, "precond_max": precond_max}
        method: dict[str, Any] = {"eta": eta, "beta_aware": beta_aware, **box}
        # η = 0 without a box: d stays at 1, and backends skip phase 1.
        self.rule = method if adaptive else {"eta": 0.0}

        # FLA's names and shapes throughout, so that its checkpoints load as they are.
        key_size, value_size = num_heads * self.head_dim, num_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, key_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_size, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        # q and k are scaled to unit vectors in the convolution: one pass over them in place of two.
        self.q_conv1d = ShortConvolution(key_size, conv_size, self.head_dim)
        self.k_conv1d = ShortConvolution(key_size, conv_size, self.head_dim)
        self.v_conv1d = ShortConvolution(value_size, conv_size)
        self.gamma_proj = self.a_proj = self.g_proj = self.initial_precond = None
        self.A_log = self.dt_bias = None
        # Parameters that DeltaNet lacks exist only where they act.
        if adaptive and forgetting == "data":
            self.gamma_proj = ForgettingGate(hidden_size, num_heads)
        if state_decay == "data":
            self.a_proj = nn.Linear(hidden_size, num_heads, bias=False)
            self.A_log = nn.Parameter(torch.empty(num_heads))
            self.dt_bias = nn.Parameter(torch.empty(num_heads))
        if adaptive and learn_initial_precond:
            self.initial_precond = nn.Parameter(torch.empty(num_heads, self.head_dim))
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, value_size, bias=False)
        # One weight vector [V] for all heads.
        self.o_norm = nn.RMSNorm(self.head_v_dim, eps=norm_eps)
        self.o_proj = nn.Linear(value_size, hidden_size, bias=False)
        self.register_load_state_dict_pre_hook(rename_former)
        self.reset_special_parameters()

    def reset_special_parameters(self) -> None:
        """The initial values of their own: d_1 = 1, γ ≈ 0.999, and A and Δ of the state's decay."""
        if self.initial_precond is not None:
            nn.init.ones_(self.initial_precond)
        if self.gamma_proj is not None:
            self.gamma_proj.reset_special_parameters()
        if self.A_log is not None and self.dt_bias is not None:
            start_decay(self.A_log, self.dt_bias)

    @property
    def state_size(self) -> int:
        """Numbers that a sequence's memory holds: H (K V + K)."""
        return self.num_heads * self.head_dim * (self.head_v_dim + 1)

    def start_precond(self) -> Tensor | None:
        """d_1 [H, K], or None for 1; in the box, where else a first token, if padding, put it."""
        d, low, high = self.initial_precond, *map(self.rule.get, ("precond_min", "precond_max"))
        # Learning may carry d_1 out of the box. Clamped here, padding in front changes nothing.
        return d if d is None or low is None else d.clamp(low, high)

    def gates(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(β, log γ, log α), each [B, T, H] in float32 or wider.

        log γ is None without forgetting, log α without state decay.
        """
        gamma = None if self.gamma_proj is None else self.gamma_proj(hidden_states)
        a = None if self.a_proj is None else self.a_proj(hidden_states)
        return self._gates(self.b_proj(hidden_states), gamma, a)

    def _gates(
        self, b: Tensor, gamma: Tensor | None, a: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gates from what their projections give [B, T, H]."""
        # Gates in float32: near 1 a bfloat16 γ moves in steps of 1/256.
        beta = widened(b).sigmoid() * (2 if self.allow_neg_eigval else 1)
        log_alpha = None
        if a is not None and self.A_log is not None and self.dt_bias is not None:
            dt = widened(a)
            dt = F.softplus(dt + self.dt_bias.to(dt.dtype))  # Δ
            log_alpha = -self.A_log.to(dt.dtype).exp() * dt
        return beta, None if gamma is None else F.logsigmoid(gamma), log_alpha

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
                # Real tokens must lie side by side, since a convolution reads its neighbours.
                order = padding_first(mask, cu_seqlens)
                hidden_states, mask = reordered(hidden_states, order), reordered(mask, order)
            # Zeros pass the convolutions as what lies before a sequence does.
            hidden_states = hidden_states.masked_fill(~mask[..., None], 0)
        given = self.operands(hidden_states, mask, cache, cu_seqlens)

        # The cache's own tensors, or None and d_1.
        state, precond = given.initial_state, given.initial_precond
        if state is not None and precond is not None and torch.is_grad_enabled():
            state, precond = state.clone(), precond.clone()  # the cache is written over, in place
        # One token without gradients: the step, in constant time and in place.
        decode = use_cache and hidden_states.shape[1] == 1 and not torch.is_grad_enabled()
        if decode and state is not None and precond is not None:
            # Without the time axis of 1.
            q, k, v, beta, log_gamma, log_alpha = (
                None if x is None else x.squeeze(1) for x in given[:6]
            )
            assert q is not None and k is not None and v is not None and beta is not None
            o, state, precond = online_scaled_delta_step(  # in place, in the cache's own tensors
                q, k, v, beta, log_gamma, log_alpha=log_alpha, state=state, precond=precond,
                backend=self.backend, **self.rule,
            )  # fmt: skip
            o = o.unsqueeze(1)
        else:
            o, state, precond = online_scaled_delta_rule(
                *given[:5], log_alpha=given.log_alpha, initial_state=state,
                initial_precond=precond, output_final_state=use_cache, cu_seqlens=cu_seqlens,
                backend=self.backend, **self.rule,
            )  # fmt: skip
            if cache is not None and state is not None and precond is not None:
                # S in slot 0, d in slot 1; the histories of q and k in slot 0, of v in slot 1.
                cache.update_recurrent_state(state, state_idx=0)
                cache.update_recurrent_state(precond, state_idx=1)
        if use_cache and cache is not None:
            cache.update_conv_state(torch.cat(given.history[:2], dim=1), state_idx=0)
            cache.update_conv_state(given.history[2], state_idx=1)

        # [B, T, H, V] to [B, T, H V]: every head is normed by itself.
        o = self.o_norm(o.to(self.o_norm.weight.dtype)).flatten(-2).to(hidden_states.dtype)
        gate = 1.0 if self.g_proj is None else F.silu(self.g_proj(hidden_states))
        y = self.o_proj(o * gate)
        # Back in the caller's order, padding included.
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
        # A cache without a past is as none: the first call fills it.
        if cache is not None and not cache.has_previous_state[0]:
            cache = None
        if self.training and cache is None and self._is_plain():
            (q, k, v), history, gates = self._jointly(hidden_states, cu_seqlens)
        else:
            zeros = None if mask is None else (~mask).sum(1)  # [B], in front of each row
            (q, k, v), history = self._convolve(hidden_states, cache, cu_seqlens, zeros)
            gates = self.gates(hidden_states)
        beta, log_gamma, log_alpha = gates  # [B, T, H]
        if mask is not None:  # a token that writes nothing and forgets nothing
            k, beta = k * mask[..., None, None], beta * mask[..., None]
            padding = ~mask[..., None]  # filled and not multiplied: −∞ · 0 is NaN
            log_gamma = None if log_gamma is None else log_gamma.masked_fill(padding, 0)
            log_alpha = None if log_alpha is None else log_alpha.masked_fill(padding, 0)
        # A past replaces both starts.
        state, precond = None, self.start_precond()
        if cache is not None:
            state, precond = cache.recurrent_states[0], cache.recurrent_states[1]
        return LayerOperands(q, k, v, beta, log_gamma, log_alpha, state, precond, history)

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
            before = [*qk.chunk(2, dim=1), value]  # q's, k's and v's, each [B, features, W−1]
        made, after = [], []
        for projection, convolution, history in zip(
            (self.q_proj, self.k_proj, self.v_proj),
            (self.q_conv1d, self.k_conv1d, self.v_conv1d),
            before,
        ):
            x, history = convolution(projection(hidden_states), history, cu_seqlens, padding)
            made.append(x.unflatten(-1, (self.num_heads, -1)))  # [B, T, H, K] or [B, T, H, V]
            after.append(history)
        return made, after

    def _is_plain(self) -> bool:
        """Whether the projections and convolutions are their weights alone: not replaced by an
        adapter's or a quantised layer, and nobody watches their calls."""
        gates = [x for x in (self.gamma_proj, self.a_proj) if x is not None]
        convolutions = [self.q_conv1d, self.k_conv1d, self.v_conv1d]
        return all(
            type(module) in (nn.Linear, ShortConvolution, ForgettingGate)
            and type(module.weight) is nn.Parameter
            and (module.bias is None or module is self.gamma_proj)
            and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
            and not (module._backward_pre_hooks or "forward" in module.__dict__)
            for module in (
                *(self.q_proj, self.k_proj, self.v_proj, self.b_proj), *gates, *convolutions
            )
        )  # fmt: skip

    def _jointly(
        self, hidden_states: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, Tensor | None, Tensor | None]]:
        """As `_convolve` and `gates` without a cache, by one product and one operator.

        In training. A product with the few columns of a gate takes a GPU as long as reading its
        input, three times with the backward, and the gradients that several products give one input
        are added up in memory. The weights are joined at every call: few bytes beside the tokens'.
        """
        D, convolutions = hidden_states.shape[-1], (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        projections = [self.q_proj, self.k_proj, self.v_proj, self.b_proj]
        projections += [x for x in (self.gamma_proj, self.a_proj) if x is not None]
        weights = [x.weight.to(self.q_proj.weight.dtype) for x in projections]
        sizes = [len(weight) for weight in weights]
        if missing := -sum(sizes) % ALIGNED:
            weights.append(weights[0].new_zeros(missing, D))
        x = F.linear(hidden_states, torch.cat(weights))  # [B, T, Σ sizes + missing]
        *made, logits = short_convolutions(
            x,
            [convolution.weight.squeeze(1) for convolution in convolutions],
            cu_seqlens,
            head_dims=[convolution.head_dim for convolution in convolutions],
        )
        made = [one.unflatten(-1, (self.num_heads, -1)) for one in made]  # [B, T, H, K] or V
        gap = convolutions[0].kernel_size[0] - 1
        history = [last_inputs(one, gap) for one in x.split([*sizes[:3], logits.shape[-1]], -1)[:3]]
        gates = logits.split(self.num_heads, -1)  # [B, T, H] each
        gamma = None if self.gamma_proj is None else self.gamma_proj.biased(gates[1])
        a = None if self.a_proj is None else gates[len(sizes) - 4]  # the last
        return made, history, self._gates(gates[0], gamma, a)
