"""The recipe of a detection run: its sections and how it is read."""
