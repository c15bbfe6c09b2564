"""Options that several commands have, and how their values are read."""

import os
import sys
from typing import Annotated, Any

import typer

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="FOLDER|NAME",
        help="Checkpoint folder, or name on the Hub. The package's miniature, if left out.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cuda, mps or cpu. The best there is, if left out."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines to stdout.")]
Boxes = Annotated[
    list[str] | None,
    typer.Option("--box", metavar="X1,Y1,X2,Y2", help="A box in pixels. May be given again."),
]
Points = Annotated[
    list[str] | None,
    typer.Option("--point", metavar="X,Y", help="A point in pixels. May be given again."),
]


def numbers(values: list[str] | None, names: str, option: str) -> list[list[float]]:
    """Coordinates as they are typed.

    >>> numbers(["1,2.5"], "X,Y", "--point")
    [[1.0, 2.5]]

    Args:
        values: One text for each use of the option.
        names: Of the coordinates, for the message.
        option: That they were given by.
    """
    found = []
    for value in values or []:
        try:
            coordinates = [float(part) for part in value.split(",")]
        except ValueError:
            coordinates = []
        if len(coordinates) != names.count(",") + 1:
            raise typer.BadParameter(
                f"{value!r} is not {names}: write the numbers with commas and without spaces.",
                param_hint=option,
            )
        found.append(coordinates)
    return found


def check_model(name: str | None) -> str:
    """The model to run: the miniature, and a word about it, if none is named."""
    if name is not None:
        return name
    from ..embedded import NOTE, embedded

    print(NOTE.format(how="--model, a checkpoint folder or name on the Hub"), file=sys.stderr)
    return os.fspath(embedded())


def check_device(name: str | None) -> str:
    """A device of this machine, the best one if none is named."""
    import torch

    from ..benchmarks.where import best_device

    if name is None:
        return best_device()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(
            f"{name!r} is no device of this machine: {reason}", param_hint="--device"
        ) from error
    return name


def is_first_process() -> bool:
    """Whether this process is the one that speaks, of those that `accelerate launch` began."""
    return os.environ.get("RANK", "0") == "0"


def quiet() -> None:
    """Keep transformers' bars and remarks off the screen; what matters is said by the commands."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def print_json(content: Any) -> None:
    """Print for machines."""
    import json

    typer.echo(json.dumps(content, indent=2))


def counting_bar() -> Any:
    """A bar on the screen that counts, of the first process; the others keep silent."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (is_first_process() and console.is_terminal),
    )
