"""Evaluation: recall, needles, perplexity and the residual ratio of any causal language model."""
