"""Rollouts by vLLM: `colocate.py` in the training processes, `server.py` over HTTP, with what runs
inside the server in `plugin.py`; all that imports vLLM is here."""
