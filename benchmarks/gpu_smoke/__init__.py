"""Whether the CUDA side of a run works: vLLM's sleep mode, memory, weights, a run that is resumed.

`run.py` starts a process per part and writes the results; `part.py` is that process; `limits.py`
says what a figure must be; the other files are the parts and what they share.
"""
