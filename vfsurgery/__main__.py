"""``python -m vfsurgery``: the command line of :mod:`vfsurgery.cli`."""

from vfsurgery.cli import main as main

if __name__ == "__main__":
    main()
