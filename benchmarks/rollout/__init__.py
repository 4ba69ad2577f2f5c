"""Completion tokens per second, our engines beside TRL's way."""
