"""What a training run will need: memory, time and money for a number of GPUs, in advance."""
