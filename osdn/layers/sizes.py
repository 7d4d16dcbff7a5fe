"""Sizes that both mixers check."""

from osdn.ops.validation import check_sizes


def head_size(hidden_size: int, num_heads: int, head_dim: int | None) -> int:
    """K: head_dim where it is given, else hidden_size // num_heads."""
    check_sizes(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim)
    if head_dim is None and hidden_size % num_heads:
        raise ValueError(
            f"num_heads: expected a divisor of hidden_size = {hidden_size}, got {num_heads}; "
            "or give head_dim"
        )
    return hidden_size // num_heads if head_dim is None else head_dim
