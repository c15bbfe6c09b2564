"""`efficientsam3 evaluate`: how good a model is, by the protocols of the field."""

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import shared

if TYPE_CHECKING:
    from ..benchmarks.running import Result, Run
    from ..benchmarks.subsets import Subset
    from ..benchmarks.tasks import Task

HELP = """Measure models: masks, concepts, detection, video, features, speed.

```
efficientsam3 evaluate -m FOLDER --suite quick
efficientsam3 evaluate -m FOLDER --task coco-box --data /data/coco
efficientsam3 evaluate -m FOLDER -m facebook/sam3 --task concept --data /data/sa-co-gold
efficientsam3 evaluate -m FOLDER -m yonigozlan/EdgeTAM-hf --task vos --data /data/DAVIS
efficientsam3 evaluate -m FOLDER --task text --data phrases.txt --teacher facebook/sam3
accelerate launch --num_processes 4 -m efficientsam3_hf.cli evaluate -m FOLDER --task ...
```

| task | dataset | numbers |
| --- | --- | --- |
| coco-box, clicks | COCO, LVIS, Roboflow, SA-1B | mIoU of single objects |
| concept | SA-Co Gold, Silver | cgF1, IL_MCC, pmF1 |
| detection | COCO, LVIS, Roboflow | AP, a phrase for each class |
| vos | DAVIS 2017, MOSE, LVOS, YouTube-VOS, SA-V | J&F, G |
| concept-video | SA-Co VEval | cgF1, pHOTA |
| text, features | phrases, pictures | likeness to --teacher |
| speed | any pictures | milliseconds of each stage |

Without --data, `--suite quick` runs on a small synthetic world. A run that was killed goes on where
it was when the same command is given again. Predictions are written in the forms in which official
servers and scripts take them.
"""


class Suite(str, Enum):
    """Sets of tasks."""

    quick = "quick"


class Precision(str, Enum):
    """Of weights and pixels."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Prompt(str, Enum):
    """What is asked of an image."""

    phrase = "phrase"
    box = "box"


class TaskName(str, Enum):
    """What `benchmarks.suite.TASKS` has; here too, so that `--help` imports nothing heavy."""

    coco_box = "coco-box"
    clicks = "clicks"
    concept = "concept"
    detection = "detection"
    vos = "vos"
    concept_video = "concept-video"
    text = "text"
    features = "features"
    speed = "speed"


def evaluate(
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            "-m",
            metavar="FOLDER|NAME",
            help="Checkpoint folder, or name on the Hub. May be given again, for one table.",
        ),
    ],
    task: Annotated[TaskName | None, typer.Option("--task", "-t", help="What to measure.")] = None,
    suite: Annotated[
        Suite | None, typer.Option("--suite", help="Everything that fits in minutes.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Folder of the dataset, or of several.")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="Of the data, if it cannot be told by its files.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of the data. The one for validation, if left out.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures, where they lie elsewhere.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the data, for tables, if it is your own.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="FOLDER|NAME", help="For text and features.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take the first so many images or videos.")
    ] = None,
    clicks: Annotated[int | None, typer.Option(min=1, help="On each object (5).")] = None,
    prompt: Annotated[
        Prompt | None, typer.Option(help="For speed. Phrases, if the model can.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images at once; phrases at once in videos.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read and decode.")] = 0,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for all that is written.")
    ] = Path("evaluation"),
    device: shared.Device = None,
    dtype: Annotated[Precision, typer.Option(help="Of weights and pixels.")] = Precision.float32,
    draws: Annotated[
        int | None, typer.Option(min=0, help="Of the bootstrap (1000; 100 for AP); 0 for none.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away an earlier run in --output.")
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Also add the numbers to the model's folder.")
    ] = False,
    as_json: shared.Json = False,
) -> None:
    if (task is None) == (suite is None):
        raise typer.BadParameter("say what to measure: --task or --suite, one of them")
    if suite is not None and (form is not None or images is not None):
        raise typer.BadParameter("--format and --images go with --task: --suite looks for itself")
    if task is not None and data is None:
        raise typer.BadParameter(f"--task {task.value} needs --data, the folder of a dataset")
    if record and (missing := [each for each in model if not Path(each).is_dir()]):
        raise typer.BadParameter(f"--record writes into a folder, which {missing[0]} is not")
    place = shared.check_device(device)
    shared.quiet()

    from ..benchmarks.running import Run, processes, run_task, short_name, slug

    if len({slug(short_name(each)) for each in model}) < len(model):
        raise typer.BadParameter("two of the models have one name, by which results are kept")
    command = shlex.join(["efficientsam3", *sys.argv[1:]])
    options: dict[str, Any] = {"batch_size": batch_size, "clicks": clicks}
    options["prompt"] = None if prompt is None else prompt.value
    results: list[Result] = []
    for each in model:
        run = Run(each, output, place, dtype.value, workers, command, restart, draws)
        if task is not None:
            assert data is not None
            jobs = [open_task(task.value, data, form, split, images, teacher, limit, options)]
        else:
            jobs = open_suite(run, data, teacher, limit, options, split)
        for job, subsets in jobs:
            for subset in subsets:
                subset.label = name or subset.label
            with progress(f"{Path(each).name} {job.name}") as show:
                result = run_task(job, subsets, run, show)
            if result is not None:
                tell(result)
                results.append(result)
    processes(place).destroy_process_group()
    if not shared.is_first_process():
        return
    if record:
        write_records(results)
    if as_json:
        shared.print_json([as_entry(result) for result in results])
    else:
        print_tables(results, output, draws)


def open_task(
    name: str,
    data: Path,
    form: str | None,
    split: str | None,
    images: Path | None,
    teacher: str | None,
    limit: int | None,
    options: dict[str, Any],
) -> tuple["Task", "list[Subset]"]:
    """A task and what it runs on."""
    from ..benchmarks.subsets import find_subsets
    from ..benchmarks.suite import TASKS

    kind = TASKS[name]
    if kind.needs_teacher:
        if teacher is None:
            raise typer.BadParameter(f"--task {name} needs --teacher, the model to compare with")
        options = {**options, "teacher": teacher}
    elif teacher is not None:
        raise typer.BadParameter(f"--task {name} has no use for --teacher")
    given = {each: value for each, value in options.items() if value is not None}
    if strange := [each for each in given if each not in kind.options]:
        raise typer.BadParameter(f"--task {name} has no use for --{strange[0].replace('_', '-')}")
    subsets = find_subsets(data, kind.formats, form, split, images)
    return kind(**given), [subset.open(limit) for subset in subsets]


def open_suite(
    run: "Run",
    data: Path | None,
    teacher: str | None,
    limit: int | None,
    options: dict[str, Any],
    split: str | None,
) -> list[tuple["Task", "list[Subset]"]]:
    """The tasks of the quick suite; says which are left out, and why."""
    from ..benchmarks.running import processes
    from ..benchmarks.suite import plan, write_synthetic_world

    is_synthetic = data is None
    if data is None:
        data = run.output / "synthetic"
        with processes(run.device).main_process_first():
            write_synthetic_world(data)
    elif not data.is_dir():
        raise FileNotFoundError(f"There is no folder {data}: --data is the folder of a dataset.")
    jobs = []
    for name, planned in plan(run.model, data, teacher, limit, options, split).items():
        if planned.task is None:
            say(f"{Path(run.model).name} {name}: left out, since {planned.reason}")
        else:
            jobs.append((planned.task, planned.subsets))
            for subset in planned.subsets if is_synthetic else []:
                subset.label, subset.name = f"synthetic {subset.form}", ""
    if not jobs:
        raise ValueError(f"There is nothing in {data} that {run.model} could be measured on.")
    return jobs


@contextmanager
def progress(title: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A bar of the first process, in batches; the others keep silent."""
    with shared.counting_bar() as bar:

        def show(count: int) -> Callable[[int], None]:
            row = bar.add_task(title, total=count)
            return lambda done: bar.advance(row, done)

        yield show


def tell(result: "Result") -> None:
    """What happened that is no number."""
    if result.skipped:
        names = ", ".join(result.skipped[:3])
        say(f"Warning: not read, and not counted, {len(result.skipped)} of the records: {names}")
    if not result.measurements:
        say(
            "Nothing was scored: the data has no truth, or none but what the model is given. "
            f"Predictions are in {result.folder}."
        )


def say(text: str) -> None:
    """A line on the screen that no machine reads."""
    if shared.is_first_process():
        print(text, file=sys.stderr)


def as_entry(result: "Result") -> dict[str, Any]:
    """A result for machines."""
    return {
        "folder": str(result.folder),
        "predictions": [str(path) for path in result.predictions],
        "skipped": result.skipped,
        "measurements": [asdict(each) for each in result.measurements],
    }


def write_records(results: "Sequence[Result]") -> None:
    """Add the headline numbers to the records beside the weights."""
    from ..evaluation.report import write_hub_record

    for result in results:
        if result.headline:
            path = write_hub_record(result.headline, result.model)
            say(f"Recorded: {path}")


def print_tables(results: "Sequence[Result]", output: Path, draws: int | None) -> None:
    """For each task a table with a row for each model, and how far they are from the first."""
    from ..benchmarks.running import compare
    from ..evaluation.report import markdown_changes, markdown_table

    of_task: dict[str, list[Result]] = {}
    for result in results:
        if result.headline:
            first = result.headline[0]
            title = f"{result.task.name}: {first.dataset}, {first.split}"
            of_task.setdefault(title, []).append(result)
    lines = []
    for title, some in of_task.items():
        decimals = some[0].task.decimals
        measurements = [each for result in some for each in result.headline]
        lines += [f"### {title}", "", markdown_table(measurements, decimals)]
        for other in some[1:] if draws != 0 else []:
            names = [result.headline[0].model for result in (some[0], other)]
            changes = compare(some[0], other, draws)
            lines += [f"From {names[0]} to {names[1]}:", "", markdown_changes(changes, decimals)]
    text = "\n".join(lines)
    if text:
        (output / "results.md").write_text(text, encoding="utf-8")
        typer.echo(text)
    for result in results:
        say(f"Written: {result.folder}")
