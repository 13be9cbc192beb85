"""opentad."""
