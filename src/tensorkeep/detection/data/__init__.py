"""Videos and annotations as training samples: containers, frames, windows, augmentation."""
