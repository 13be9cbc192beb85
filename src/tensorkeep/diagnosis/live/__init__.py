"""Live: models in a running process, held against their checkpoints; the layer that imports torch."""
