"""What Inductor makes of a model's graphs for a GPU that is not there."""
