"""Stage 8: the policy's weights in, an engine that samples from exactly these out."""
