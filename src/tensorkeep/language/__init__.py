"""Training language models: texts into tokens, tokens into rows, rows into losses."""
