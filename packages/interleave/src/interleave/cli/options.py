"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Configs = Annotated[
    list[Path] | None, typer.Argument(metavar="CONFIG...", help="YAML files; later ones override earlier ones.")
]
MiniatureConfigs = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="CONFIG...", help="YAML files; later ones override earlier ones. Default: the miniature's recipe."
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the configuration; may be repeated."),
]
Name = Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run folder.")]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder that holds the run folders.")]
Yes = Annotated[bool, typer.Option("--yes", help="Ask the judge whatever it costs.")]
Shard = Annotated[
    str | None, typer.Option("--shard", metavar="K/N", help="Do the K-th of N parts, as machines share it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON.")]
