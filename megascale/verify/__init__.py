"""Checks a config's promise: the same losses, gradients and weights on every layout, with its model made small."""
