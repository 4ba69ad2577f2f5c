"""The state of a run in, a checkpoint directory that is complete or absent out, and back."""
