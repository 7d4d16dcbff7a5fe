"""Online Scaled DeltaNet (arXiv 2605.13473): operator, layer, model, training, measurement."""

__version__ = "0.1.0"
