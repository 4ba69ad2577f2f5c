"""Stage 6: a micro-batch in, its log-probs or its loss out, inside the wrapped model's forward."""
