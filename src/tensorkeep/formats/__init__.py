"""Formats: how bytes lie on disk. Each module has the verbs `sniff`, `read` and, unless read-only, `layout`."""
