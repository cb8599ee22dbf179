"""Bytes to ordered batches of uint8 pixels, by processes."""
