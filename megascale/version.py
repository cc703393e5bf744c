"""The version, here alone: the package's metadata, `megascale version` and the configs of runs take it from here."""

__version__ = "0.1.0"
