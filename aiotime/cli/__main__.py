"""``python -m aiotime.cli``: the command without its entry point."""

from aiotime.cli import main

main()
