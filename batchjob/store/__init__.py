"""Every byte under RUN: how it is made, published, checked, mended and read."""
