"""Scores and null models: pure NumPy, what is computed on the device in torch, and one table that lists them all."""
