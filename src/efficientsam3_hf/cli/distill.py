"""`efficientsam3 distill`: a student for your own pictures and phrases."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import shared

if TYPE_CHECKING:
    from ..distillation.folder_plan import FolderPlan
    from ..distillation.folder_result import FolderResult

HELP = """Distil SAM 3 into a small student on your own pictures and phrases; no annotations needed.

```
efficientsam3 distill --images photos --phrases phrases.txt --student NAME --output FOLDER --dry-run
efficientsam3 distill --images photos --phrases phrases.txt \\
    --student efficientsam3-tinyvit-s-sam3text --output my-student
efficientsam3 distill ... --epochs 50 --prompts --set stage3_concepts.training.learning_rate=5e-5
accelerate launch --num_processes 4 -m efficientsam3_hf.cli distill ... --yes
```

The teacher labels the pictures; the student learns from labels and features, is calibrated, and is
compared with the teacher on pictures that it has not seen. A plan with times comes first. A run
that was stopped goes on where it was when the same command is given again. `efficientsam3 zoo`
lists the students.
"""


class Cache(str, Enum):
    """Whether the teacher's features are kept on disk."""

    auto = "auto"
    yes = "yes"
    no = "no"


def distill(
    images: Annotated[Path, typer.Option("--images", help="Folder of pictures.")],
    phrases: Annotated[
        Path,
        typer.Option(
            "--phrases", help="A phrase in each line; or JSON: a list, or lists by picture."
        ),
    ],
    student: Annotated[
        str,
        typer.Option("--student", metavar="NAME|FOLDER", help="Variant of the zoo, or a folder."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the student.")],
    teacher: Annotated[
        str, typer.Option("--teacher", metavar="FOLDER|NAME", help="A SAM 3.")
    ] = "facebook/sam3",
    held_out: Annotated[
        float,
        typer.Option(help="Share of the pictures for calibration and evaluation, half for each."),
    ] = 0.1,
    confidence: Annotated[
        float, typer.Option(help="A detection of the teacher that scores above is an instance.")
    ] = 0.5,
    absent: Annotated[
        float,
        typer.Option(
            help="A phrase of which nothing scores above, in the picture and in its mirror image, "
            "is not there. What lies between is left out."
        ),
    ] = 0.1,
    prompts: Annotated[
        bool, typer.Option("--prompts", help="Also train on masks for boxes and clicks.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Of each stage.")] = None,
    epochs: Annotated[float | None, typer.Option(min=0.0, help="Of each stage.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures at once (8; 2 on a CPU).")
    ] = None,
    cache: Annotated[
        Cache, typer.Option(help="Keep the teacher's features on disk: if it pays and fits.")
    ] = Cache.auto,
    random_trunk: Annotated[
        bool, typer.Option("--random-trunk", help="Do not start from timm's ImageNet weights.")
    ] = False,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="STAGE.SECTION.FIELD=VALUE",
            help="Any setting of a stage. May be given again.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that read and decode (4; 0 on a CPU).")
    ] = None,
    device: shared.Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and write nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before it starts.")] = False,
    as_json: shared.Json = False,
) -> None:
    overrides = read_changes(change or [])
    if not (dry_run or yes or sys.stdin.isatty()):
        raise typer.BadParameter("nobody is there to ask: give --yes, or --dry-run for the plan")
    place = shared.check_device(device)
    shared.quiet()

    from ..distillation.folder_settings import FolderSettings
    from ..distillation.own_folder import FolderJob

    settings = FolderSettings(
        images=str(images),
        phrases=str(phrases),
        student=student,
        output=str(output),
        teacher=teacher,
        held_out=held_out,
        confidence=confidence,
        absent=absent,
        prompts=prompts,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        cache=cache.value,
        pretrained_trunk=not random_trunk,
        device=place,
        workers=workers,
        seed=seed,
        overrides=overrides,
    )
    with redirect_stdout(sys.stderr), bars() as show:  # stdout is for the result alone
        job = FolderJob(settings, show)
        plan = job.plan()
        if shared.is_first_process():
            print_plan(plan)
        if not dry_run and (yes or typer.confirm("Start?", err=True)):
            result = job.run()
        else:
            result = None
    if not shared.is_first_process():
        return
    if as_json:
        answer = {"plan": plan.as_dict(), "result": None if result is None else result.as_dict()}
        shared.print_json(answer)
    elif result is not None:
        print_result(result)


def read_changes(changes: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Settings by stage and section.

    >>> read_changes(["stage1_text.training.max_steps=5"])
    {'stage1_text': {'training': {'max_steps': '5'}}}
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for change in changes:
        place, equals, value = change.partition("=")
        parts = place.split(".")
        if not equals or len(parts) != 3 or not all(parts):
            raise typer.BadParameter(
                f"{change!r} is not STAGE.SECTION.FIELD=VALUE, such as "
                "stage3_concepts.training.learning_rate=5e-5",
                param_hint="--set",
            )
        stage, section, name = parts
        found.setdefault(stage, {}).setdefault(section, {})[name] = value
    return found


@contextmanager
def bars() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Bars of the first process, one after another; the others keep silent."""
    running: list[Any] = []

    def stop() -> None:
        while running:
            running.pop().stop()

    def show(title: str, total: int) -> Callable[[int], None]:
        stop()
        progress = shared.counting_bar()
        progress.start()
        running.append(progress)
        row = progress.add_task(title, total=total)

        def advance(done: int) -> None:
            progress.advance(row, done)
            if progress.finished:  # others may write to the screen again
                progress.stop()

        return advance

    try:
        yield show
    finally:
        stop()


def print_plan(plan: "FolderPlan") -> None:
    """What there is to do, for readers."""
    from rich.console import Console
    from rich.table import Table

    from ..distillation.folder_plan import duration

    console = Console(stderr=True)
    table = Table(title=f"Plan: about {duration(plan.seconds)}")
    for column in ("what", "how much", "time"):
        table.add_column(column)
    for row in plan.rows():
        table.add_row(*row)
    console.print(table)
    for remark in plan.remarks:
        console.print(f"Note: {remark}", markup=False)


def print_result(result: "FolderResult") -> None:
    """What came of it, for readers."""
    from ..evaluation.report import Measurement, markdown_table

    for name, part in result.labels.items():
        left_out = f", {part['left out']:,} pictures left out" if part["left out"] else ""
        typer.echo(
            f"{name}: {part['pictures']:,} pictures; phrases present {part['present']:,}, absent "
            f"{part['absent']:,}, doubtful and not used {part['doubtful']:,}{left_out}"
        )
    if result.broken:
        typer.echo(f"Not read ({len(result.broken)}):")
        for name, reason in result.broken.items():
            typer.echo(f"  {name}: {reason}")
    if result.calibration is not None:
        before, after = (f"{share:.1%}" for share in result.calibration["false_positives"])
        typer.echo(
            f"Calibrated: of phrases that name nothing, {before} found something before, {after} "
            "do now (validation)."
        )
    measured = [Measurement(**each) for each in result.measurements]
    if measured:
        typer.echo(
            f"\nThe student on {measured[0].dataset}, {measured[0].split}. These numbers say how "
            "near it is to the teacher, and not how often either is right:\n"
        )
        typer.echo(markdown_table(measured))
    for remark in result.remarks:
        typer.echo(f"Note: {remark}")
    typer.echo(f"Written: {result.folder}. Its folder `work` is needed only to go on.")
