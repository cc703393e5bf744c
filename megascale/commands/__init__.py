"""The command line: one module per subcommand, each with `app`. Modules import torch and everything slow inside functions, so that
`--help` answers at once; the work itself is done by other packages.
"""
