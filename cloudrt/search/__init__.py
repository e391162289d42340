"""Exact search of rules, the choice of one, tuning, and stored probabilities."""
