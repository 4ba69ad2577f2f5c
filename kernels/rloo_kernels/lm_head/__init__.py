"""Hidden states and the lm_head in, log-probs or the whole RLOO loss out, never [N, V] logits."""
