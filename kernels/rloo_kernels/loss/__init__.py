"""Per-token log-probs and rewards in, advantages and the RLOO objective out."""
