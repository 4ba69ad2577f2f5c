"""Settings as they were given in, a checked RLOOConfig out, before a model is loaded.

This file imports nothing, so that tables and names can be read without torch or transformers.
"""
