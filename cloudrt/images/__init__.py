"""List, check, decode and resize images: one code path for training, tuning and inference."""
