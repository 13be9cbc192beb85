"""Other trainers' checkpoints under the same rules as ours: whole or not there, digested, found again.

One module for each library, imported only when asked for: `tensorkeep.integrations.transformers`, `.accelerate`,
`.lightning`, `.opentad`; and `.guard` for any of them, which imports none.
"""
