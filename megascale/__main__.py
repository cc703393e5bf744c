"""`python -m megascale`: the command `megascale` where no script of that name is on the PATH."""

from megascale.commands.main import main

if __name__ == "__main__":
    main()
