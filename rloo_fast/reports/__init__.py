"""What people look at during a run and after it: logs, samples, curves, the model card."""
