"""Chooses a layout before anything runs: clusters as data, cost of a step, search, scaling, a simulated job. Imports no torch."""
