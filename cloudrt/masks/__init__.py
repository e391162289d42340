"""Run-length encoding, rules and post-processing, Dice, and tables of RLE rows."""
