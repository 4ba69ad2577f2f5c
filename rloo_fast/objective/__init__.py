"""Stage 5: rewards and log-probs in; advantages, importance weights, loss options out."""
