"""Chooses a layout before anything runs: clusters as data, cost of a step, search, goodput. Imports no torch."""
