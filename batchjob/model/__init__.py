"""From a network to attention rows, layer by layer."""
