"""A model's shape and a cluster in, memory and traffic of a run on paper out."""
