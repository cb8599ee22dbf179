"""Scores and null models in NumPy, some of them again in torch for the device, and one table that lists them all."""
