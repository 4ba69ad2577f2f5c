"""How long `rloo-fast view` takes to open runs of 10, 100 and 1,000 steps of 512 completions."""
