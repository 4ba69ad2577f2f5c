"""A program and a test in, a record of how they ended out: the sandbox's own processes.

Their Python imports nothing else of rloo_fast.
"""
