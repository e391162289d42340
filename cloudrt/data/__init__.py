"""A labelled data set: folder layout, exploration, audit, duplicates, and synthetic scenes."""
