"""`python -m megascale`: the command `megascale` if its script is not on the PATH."""

from megascale.commands.main import main

if __name__ == "__main__":
    main()
