#!/usr/bin/env python3
"""torchrun's agent on one node, as launchers/torchrun.sh starts it: python launchers/agent.py RANKS SCRIPT [ARGUMENT …]."""

import os
import sys

from megascale.comm.agent import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
