"""Dynamic sampling: what it costs to fill batches with groups that have signal."""
