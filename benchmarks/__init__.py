"""Benchmarks beside peers, in one process, behind a correctness gate."""
