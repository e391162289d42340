"""Run-length encoding, post-processing of probability maps, Dice, and tables of RLE rows."""
