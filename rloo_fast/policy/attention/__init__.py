"""Queries, keys and values of packed segments in, attention outputs out, for any model."""
