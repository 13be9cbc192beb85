"""What a contributor adds: a format, a naming, a check and a kind of adapter, one file each."""
