"""A model's identity: one hash of its tensors under hf names, whatever the format, and what is built on it."""
