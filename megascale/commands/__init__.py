"""The command line: one module a subcommand, each with `app`. They import torch and everything slow inside their functions, so that
`--help` answers at once; what they do is in the rooms below.
"""
