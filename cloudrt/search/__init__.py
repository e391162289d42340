"""Exact search of post-processing rules, the choice of a rule, tuning, and stored probabilities."""
