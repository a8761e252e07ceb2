"""``vfsurgery push``: a folder with its card to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click

from vfsurgery.cli.options import EPILOG
from vfsurgery.hub import listed, push_to_hub


@click.command(epilog=EPILOG)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Make a private repository, and refuse one that is public.")
@click.option("--revision", metavar="BRANCH", help="A branch that is there.  [default: main]")
@click.option("--message", help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="Only list what would be uploaded.")
def push(folder: Path, repo_id: str, private: bool, revision: str | None, message: str | None, dry_run: bool) -> None:
    """Upload FOLDER, which has a card, to the Hugging Face Hub as USER/NAME.

    Networks, card, reports, pictures and pages are uploaded, in one commit; nothing hidden, no folders below, no
    links and no pickled checkpoints. Log in before with "hf auth login", or set HF_TOKEN.

    \b
    Examples:
      vfsurgery push out/digits ada/digits-merged --dry-run
      vfsurgery push out/digits ada/digits-merged --private
    """
    files = listed(folder)
    click.echo("\n".join(f"{path.name}  {path.stat().st_size:,} bytes" for path in files))
    if not dry_run:
        address = push_to_hub(folder, repo_id, private=private, revision=revision, message=message)
        click.echo(f"\nuploaded to {address}")
