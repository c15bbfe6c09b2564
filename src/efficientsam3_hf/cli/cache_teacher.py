"""`efficientsam3 cache-teacher`: the teacher's features of a dataset, written to a folder."""

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from . import shared
from .evaluate import Precision

HELP = """Write a teacher's features of pictures or videos to disk, for students to learn from.

```
efficientsam3 cache-teacher --images photos -o cache --plan-only
efficientsam3 cache-teacher --images photos -o cache --codec pca --rank 256
efficientsam3 cache-teacher --images sa-1b --format sa1b --fraction 0.01 -o cache --flips
efficientsam3 cache-teacher --images videos --kind clip -o cache
accelerate launch --num_processes 4 -m efficientsam3_hf.cli cache-teacher ...
```

A run that was stopped goes on where it was when the same command is given again.
"""


class Kind(str, Enum):
    """What `teacher.KINDS` has."""

    trunk = "trunk"
    levels = "levels"
    tracker_levels = "tracker_levels"
    clip = "clip"


class CodecName(str, Enum):
    """How features are stored."""

    fp16 = "fp16"
    int8 = "int8"
    pca = "pca"


def cache_teacher(
    images: Annotated[Path, typer.Option("--images", help="Folder of the pictures or videos.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the cache.")],
    teacher: Annotated[
        str, typer.Option("--teacher", metavar="FOLDER|NAME", help="A SAM 3.")
    ] = "facebook/sam3",
    layout: Annotated[
        str,
        typer.Option("--format", help="Layout of the folder: a reader of docs/data.md, as sa1b."),
    ] = "folder",
    split: Annotated[str, typer.Option(help="Of the folder, where its format has some.")] = "train",
    annotations: Annotated[
        str | None, typer.Option(help="File of annotations, where the format needs it named.")
    ] = None,
    tars: Annotated[str, typer.Option(help="Which of SA-1B's tars, as a pattern.")] = "*.tar",
    kind: Annotated[
        Kind,
        typer.Option(
            help="The trunk's output; the maps of the neck, or of the tracker's; or what the "
            "tracker needs of each frame of clips."
        ),
    ] = Kind.trunk,
    codec: Annotated[CodecName, typer.Option(help="How they are stored.")] = CodecName.int8,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Components of pca; by --energy, if left out.")
    ] = None,
    energy: Annotated[float, typer.Option(help="Share of the variance that pca keeps.")] = 0.99,
    fit_samples: Annotated[int, typer.Option(min=1, help="That pca is fitted on.")] = 256,
    flips: Annotated[
        bool, typer.Option("--flips", help="Each picture flipped left to right, too.")
    ] = False,
    fraction: Annotated[float | None, typer.Option(help="Share of the records to take.")] = None,
    subset_seed: Annotated[int, typer.Option(help="Another one takes others.")] = 0,
    frames: Annotated[int, typer.Option(min=1, help="Of each cut of a video.")] = 8,
    frame_step: Annotated[int, typer.Option(min=1, help="Take every n-th frame.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 8,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read and decode.")] = 4,
    shard_megabytes: Annotated[float, typer.Option(min=0.0, help="Size of a file.")] = 256.0,
    dtype: Annotated[Precision, typer.Option(help="Of the teacher.")] = Precision.bfloat16,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the teacher's trunk.")
    ] = False,
    device: shared.Device = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Say what it would take, and stop.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="In the end, read all shards again.")
    ] = False,
    as_json: shared.Json = False,
) -> None:
    place = shared.check_device(device)
    shared.quiet()

    from ..distillation.cache_command import CacheArguments, run

    if not images.is_dir():
        raise typer.BadParameter(f"{images} is no folder", param_hint="--images")
    arguments = CacheArguments(
        images=str(images),
        output=str(output),
        teacher=teacher,
        format=layout,
        split=split,
        annotations=annotations,
        tars=tars,
        kind=kind.value,
        codec=codec.value,
        rank=rank,
        energy=energy,
        fit_samples=fit_samples,
        flips=flips,
        fraction=fraction,
        subset_seed=subset_seed,
        frames=frames,
        frame_step=frame_step,
        batch_size=batch_size,
        num_workers=workers,
        shard_megabytes=shard_megabytes,
        dtype=dtype.value,
        compile=compiled,
        # Several processes have a GPU each, which accelerate chooses.
        device=None if place == "cuda" else place,
        plan_only=plan_only,
        verify=verify,
    )
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        report = run(arguments)
    if as_json and shared.is_first_process():
        cache = report.cache
        written = None
        if cache is not None:
            written = {"folder": str(output), "pictures": len(cache), "errors": cache.errors}
        shared.print_json({"plan": asdict(report.plan), "cache": written})
