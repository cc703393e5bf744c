"""The only place of the version: the package's metadata, `megascale version` and the configs of runs read it."""

__version__ = "0.1.0"
