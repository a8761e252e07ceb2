"""Commands as from a shell, without what takes time where it is not the matter."""

from __future__ import annotations

from click.testing import CliRunner, Result

from vfsurgery.cli import main


def call(*arguments: object) -> Result:
    """Run a command; merges without ``--data`` make no images."""
    given = [str(argument) for argument in arguments]
    return CliRunner().invoke(main, [*given, *["--no-imagine"] * (given[:1] == ["merge"] and "--data" not in given)])
