"""FP8 with static unit scaling: quality, learning rates over width, what casts lose, speed on a GPU."""
