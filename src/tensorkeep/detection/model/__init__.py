"""The detector: a VideoMAE backbone with adapters, ActionFormer's projection and head, losses."""
