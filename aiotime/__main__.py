"""``python -m aiotime``: the command line."""

from aiotime.cli import main

if __name__ == "__main__":
    main()
