"""Go on from MiniMind's resume files, and write them."""
