"""Temporal action detection: annotations, model, assignment and losses, decoding, suppression, evaluation."""
