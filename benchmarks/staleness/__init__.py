"""Training on completions of older weights: what each loss makes of a lag, and of long rows."""
