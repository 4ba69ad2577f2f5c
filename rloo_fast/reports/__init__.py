"""Records of a run in; logs, samples, curves and a model card out, for people to look at."""
