"""Texts, conversations and preferences as rows of tokens."""
