"""Causal softmax attention as a token mixer: the baseline, and the other half of a hybrid."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.cache_utils import Cache, DynamicLayer

from osdn.layers.cache import Mixed
from osdn.layers.sizes import head_size
from osdn.ops.packing import check_cu_seqlens, remember


class Attention(nn.Module):
    """Causal softmax attention with rotary positions, the baseline and the hybrid's other half.

    o = softmax(q kᵀ / sqrt(K)) v per head (PyTorch's scaled_dot_product_attention), y = W_o o.
    Rotary positions count a row's real tokens. They only enter as differences, so that packed
    sequences need no positions of their own.

    Args:
        hidden_size, num_heads, head_dim, layer_idx: as in OSDN.
        rope_theta: base of the rotary frequencies (arXiv 2104.09864).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        rope_theta: float = 10000.0,
        layer_idx: int | None = None,
    ):
        super().__init__()
        self.num_heads, self.layer_idx, self.rope_theta = num_heads, layer_idx, rope_theta
        self.head_dim = head_size(hidden_size, num_heads, head_dim)
        # Rotary turns pairs of features.
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for rotary, got {self.head_dim}")
        # No grouped heads: this is a baseline of the same width as OSDN.
        size = num_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, size, bias=False)
        self.k_proj = nn.Linear(hidden_size, size, bias=False)
        self.v_proj = nn.Linear(hidden_size, size, bias=False)
        self.o_proj = nn.Linear(size, hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Mixed:
        """As OSDN.forward; attention_mask covers the cached tokens too, [B, past + T]."""
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, hidden_states, "hidden_states")
        if cu_seqlens is not None and past_key_values is not None:
            raise ValueError("cu_seqlens: expected none with a cache; pack or decode, not both")
        # A cache tells how many tokens came before; without one this is the start.
        past = 0
        if past_key_values is not None:
            if self.layer_idx is None:
                raise ValueError("past_key_values: this layer was built without a layer_idx")
            past = growing_length(past_key_values, self.layer_idx)
        # Each [B, H, T, K], with K = V.
        q, k, v = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        positions = token_positions(attention_mask, hidden_states, past)  # [B or 1, T]
        q, k = (rotate(x, positions, self.rope_theta) for x in (q, k))
        if past_key_values is not None and self.layer_idx is not None:
            # Keys and values go on growing in the cache, or are read from it and left as they were.
            if use_cache:
                k, v = past_key_values.update(k, v, self.layer_idx)
            elif past:
                seen: Any = past_key_values.layers[self.layer_idx]
                k, v = torch.cat([seen.keys, k], dim=-2), torch.cat([seen.values, v], dim=-2)
        # Packed documents: by their own kernel where there is one, else under a mask of [T, T].
        if cu_seqlens is not None and attention_mask is None and flash_packs(q):
            o = packed_attention(q, k, v, cu_seqlens)
        else:
            mask = attention_pattern(q, k, attention_mask, cu_seqlens)  # [B or 1, 1, T, S], or None
            # [B, H, T, V]
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(o.transpose(1, 2).flatten(-2)), None, past_key_values


def growing_length(past_key_values: Cache, layer_idx: int) -> int:
    """Tokens in this layer's part of a cache, which must be one that grows with them, or none yet.

    What a StaticCache hands back is of its full length, with places that hold no token.
    """
    layers = past_key_values.layers
    if layer_idx < len(layers) and not isinstance(layers[layer_idx], DynamicLayer):
        raise ValueError(
            f"past_key_values: expected a cache layer that grows, a DynamicLayer, at index "
            f"{layer_idx}, got {type(layers[layer_idx]).__name__}; build the cache as "
            "osdn.OSDNCache(model.config)"
        )
    return past_key_values.get_seq_length(layer_idx)


def flash_packs(q: Tensor) -> bool:
    """Whether PyTorch's variable-length flash attention takes such tensors."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention within each sequence, [1, H, T, K], in time and memory of the sequences."""
    # The longest sequence is not known without a wait for the device; T is a bound.
    T, offsets = q.shape[2], cu_seqlens.int()
    # [T, H, K], as varlen_attn takes them
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
    causal = (-1, 0)  # no limit to the left, nothing to the right
    o = varlen_attn(q, k, v, offsets, offsets, T, T, window_size=causal)
    assert isinstance(o, Tensor)  # a tuple only with return_aux
    return o.transpose(0, 1).unsqueeze(0)


def token_positions(attention_mask: Tensor | None, hidden_states: Tensor, past: int) -> Tensor:
    """[B or 1, T]: how many real tokens of its row come before each of the last T tokens.

    attention_mask: [B, past + T], 0 for padding; None without any.
    """
    B, T = hidden_states.shape[:2]
    if attention_mask is None:
        return torch.arange(past, past + T, device=hidden_states.device)[None]
    if attention_mask.shape != (B, past + T):
        raise ValueError(
            f"attention_mask: expected [B, past + T] = {[B, past + T]}, "
            f"got shape {list(attention_mask.shape)}"
        )
    # A row's first real token is at 0, wherever its padding stands.
    return (attention_mask.bool().cumsum(1) - 1).clamp(min=0)[:, past:]


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding of x [B, H, T, K] at positions [B or 1, T]: pairs (i, i + K/2)."""
    # In float32: at position 10,000 a bfloat16 angle is off by several turns.
    K, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    frequency = theta ** (-torch.arange(0, K, 2, device=x.device, dtype=wide) / K)  # [K/2]
    angle = positions[:, None, :, None].to(wide) * frequency  # [B or 1, 1, T, K/2]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(wide).chunk(2, dim=-1)  # [B, H, T, K/2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def attention_pattern(
    q: Tensor, k: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """What each query may see, a boolean mask [B or 1, 1, T, S], or None for plain causal."""
    T, S = q.shape[-2], k.shape[-2]
    # None lets PyTorch take its causal kernel, which a mask of the same content does not.
    if attention_mask is None and cu_seqlens is None and T == S:
        return None
    seen = _causal(T, S, q.device) if cu_seqlens is None else _packed(cu_seqlens, S)
    if attention_mask is not None:
        # A padding token sees itself: a softmax over nothing would be NaN, and spread.
        itself = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T).tril(S - T)
        seen = seen & attention_mask[:, None, None].bool() | itself  # no empty row
    return seen


def _causal(T: int, S: int, device: torch.device) -> Tensor:
    """[1, 1, T, S]: the last T of S tokens see all up to themselves."""
    row, column = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)
    return (column <= row)[None, None]


def _packed(cu_seqlens: Tensor, T: int) -> Tensor:
    """[1, 1, T, T]: causal within each sequence of cu_seqlens; one mask for all layers."""
    return remember(cu_seqlens, ("attention mask", T), lambda: _packed_now(cu_seqlens, T))


def _packed_now(cu_seqlens: Tensor, T: int) -> Tensor:
    time = torch.arange(T, device=cu_seqlens.device)
    # [T], the number of each token's document
    document = torch.searchsorted(cu_seqlens[1:], time, right=True)
    return _causal(T, T, cu_seqlens.device) & (document[:, None] == document)
