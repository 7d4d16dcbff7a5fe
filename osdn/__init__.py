"""Online Scaled DeltaNet (arXiv 2605.13473): operator, layer, model, training, measurement."""

from osdn.layers.osdn import OSDN
from osdn.model.cache import OSDNCache
from osdn.model.configuration import OSDNConfig
from osdn.model.modeling import (
    OSDNForCausalLM,
    OSDNForSequenceClassification,
    OSDNForTokenClassification,
    OSDNModel,
)
from osdn.ops import online_scaled_delta_rule, online_scaled_delta_step

__version__ = "0.1.0"

__all__ = [
    "OSDN",
    "OSDNCache",
    "OSDNConfig",
    "OSDNForCausalLM",
    "OSDNForSequenceClassification",
    "OSDNForTokenClassification",
    "OSDNModel",
    "online_scaled_delta_rule",
    "online_scaled_delta_step",
]
