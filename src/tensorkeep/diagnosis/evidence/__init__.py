"""Measurements that the checks are built on, one kind a module; numpy only, tensors streamed."""
