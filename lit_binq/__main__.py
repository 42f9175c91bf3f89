"""`python -m lit_binq`: the command `litbinq`."""

from lit_binq.cli.main import command

command()
