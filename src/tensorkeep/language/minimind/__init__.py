"""MiniMind's resume files, read and written."""
