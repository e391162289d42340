"""Labelled data sets: the folder layout, exploration, audit, near-duplicates and synthetic scenes."""
