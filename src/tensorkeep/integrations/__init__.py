"""Guests: other trainers' checkpoints under the same rules as ours. One module a library, imported only when asked for:

`tensorkeep.integrations.transformers`, `.accelerate`, `.lightning`, `.opentad`.
"""
