"""A name or a model in; the policy, its tokenizer and its reference model out."""
