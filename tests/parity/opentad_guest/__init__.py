"""OpenTAD's unmodified tools under `tensorkeep.integrations.opentad`: see `__main__`."""
