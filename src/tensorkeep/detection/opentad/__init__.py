"""OpenTAD's configs, resume files and averages, read without executing anything."""
