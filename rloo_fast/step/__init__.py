"""Stage 7: prompts in, one optimizer step's gradients and records out: collect, prepare, update."""
