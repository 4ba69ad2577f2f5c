"""What runs in the sandbox's own processes, in a Python that imports nothing else of rloo_fast."""
