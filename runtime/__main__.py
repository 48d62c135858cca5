"""`python -m clapsep.runtime` is the `clapsep` command."""

from .cli import main

main(prog_name="clapsep")
