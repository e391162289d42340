"""Inference from images to a submission: `Segmenter`, the journal, and the output formats."""
