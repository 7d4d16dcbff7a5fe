"""The operator: the online scaled delta rule over a sequence, and one token of it."""

from osdn.ops.interface import online_scaled_delta_rule, online_scaled_delta_step

__all__ = ["online_scaled_delta_rule", "online_scaled_delta_step"]
