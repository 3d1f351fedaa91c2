"""`python -m calotype` is the command `calotype`."""

from calotype.cli.main import run

run()
