"""What DATA is: the index of its images, their bytes, pixels and annotations."""
