"""From inputs to outputs: `Segmenter`, the journal, the submission and its formats."""
