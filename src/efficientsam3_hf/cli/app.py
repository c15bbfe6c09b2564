"""All commands in one program, and what it says when something goes wrong."""

import sys
from typing import Annotated

import typer

from . import cache_teacher, distill, evaluate, segment, track, zoo

# Exit codes: 0 all went well, 1 a fault of the program, 2 a wrong command line or input.
WRONG_INPUT = 2

app = typer.Typer(
    name="efficientsam3",
    help="Segment, track, evaluate and distil with EfficientSAM3: SAM 3 for small devices.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("segment", help=segment.HELP)(segment.segment)
app.command("track", help=track.HELP)(track.track)
app.command("evaluate", help=evaluate.HELP)(evaluate.evaluate)
app.command("cache-teacher", help=cache_teacher.HELP)(cache_teacher.cache_teacher)
app.command("distill", help=distill.HELP)(distill.distill)
app.command("zoo", help=zoo.HELP)(zoo.zoo)


def print_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where in the code an error comes from.")
    ] = False,
) -> None:
    """Options that go before the command."""
    # `main` looks for --debug itself, since what it catches has left the program's options behind.


def main() -> None:
    """Run a command. What the user can mend is said in words, without a traceback."""
    try:
        app(prog_name="efficientsam3")
    except (ValueError, OSError, ImportError, MemoryError, FloatingPointError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
