"""OpenTAD's unmodified detectors beside ours, on features: see `__main__`."""
