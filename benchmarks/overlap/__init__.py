"""Seconds of a step whose completions were sampled ahead, beside those of sampling and training."""
