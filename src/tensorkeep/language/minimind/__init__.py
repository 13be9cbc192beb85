"""minimind."""
