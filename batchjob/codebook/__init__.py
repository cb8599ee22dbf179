"""One k-means over the rows of all images of a data set."""
