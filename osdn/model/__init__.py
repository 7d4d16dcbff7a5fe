"""The language model: configuration, modules, conversion of DeltaNet checkpoints."""
