"""One file a command: read, call a tool, show. A command's docstring is its help."""
