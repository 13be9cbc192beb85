"""Compare models in a running process with their checkpoints, and run them; this part imports torch."""
