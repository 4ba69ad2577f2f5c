"""Attention of one layer, prompts shared, packed or padded."""
