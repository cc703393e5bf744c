"""Measured numbers with the scripts that measure them."""
