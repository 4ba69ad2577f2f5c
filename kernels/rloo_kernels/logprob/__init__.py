"""Logits in, the log-prob of one token per row and the row's entropy out."""
