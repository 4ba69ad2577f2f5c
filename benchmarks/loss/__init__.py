"""The RLOO loss beside its peers."""
