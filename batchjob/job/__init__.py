"""Prepare, fit and label: the loop over partitions and batches."""
