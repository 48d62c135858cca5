"""`python -m clapsep.export` is the `clapsep-export` command."""

from .cli import main

main(prog_name="clapsep-export")
