"""Stage 4: rows with token ids in, micro-batches of a bounded number of tokens out."""
