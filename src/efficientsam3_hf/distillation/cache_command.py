"""`efficientsam3 cache-teacher`: the teacher's features of a dataset, written to a folder.

    python -m efficientsam3_hf.distillation.cache_command --images photos --output cache
    accelerate launch -m efficientsam3_hf.distillation.cache_command --config cache.yaml

Several ranks share the work; run again after an interruption, it goes on where it stopped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import HfArgumentParser

from .. import zoo
from ..data.loading import Samples
from .arguments import check_known, option
from .cache_files import DiskFullError
from .cache_writer import CacheOptions, CachePlan, CacheWriter
from .data_settings import FORMATS, DataSettings, load_samples
from .teacher import KINDS, Teacher, load_teacher
from .teacher_cache import TeacherCache


@dataclass
class CacheArguments(CacheOptions):
    """What to cache, of which teacher, and where. The rest is in `CacheOptions`."""

    images: str = option("", "Folder of the pictures or videos.")
    output: str = option("", "Folder of the cache.")
    teacher: str = option("facebook/sam3", "Folder or Hub name of a SAM 3.")
    format: str = option("folder", "Layout of the dataset: a reader of docs/data.md.")
    split: str = option("train", "Its part, where the format has parts.")
    annotations: str | None = option(None, "File of annotations, where the format needs it named.")
    tars: str = option("*.tar", "Which of SA-1B's tars, as a pattern.")
    fraction: float | None = option(None, "Share of the records to take; None for all.")
    subset_seed: int = option(0, "Another one takes others.")
    frames: int = option(8, "Of each cut, for videos.")
    frame_step: int = option(1, "2 takes every second frame of a video, ...")
    dtype: str = option("bfloat16", "Of the teacher: float32, bfloat16 or float16.")
    compile: bool = option(False, "Compile the teacher's trunk.")
    device: str | None = option(None, "None for the best there is.")
    plan_only: bool = option(False, "Say what it would take, and stop.")
    verify: bool = option(False, "Read all shards in the end, and say whether one is damaged.")

    def __post_init__(self) -> None:
        for name in ("images", "output"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing: the folder of the {WHAT[name]}.")
        if self.kind not in KINDS:
            raise ValueError(f"--kind is one of {', '.join(KINDS)}, not {self.kind!r}.")
        check_known(self.format, list(FORMATS[self.samples]), f"format of {self.samples}")

    @property
    def samples(self) -> str:
        """What is cached: a key of `FORMATS`."""
        return "clips" if self.kind == "clip" else "pictures"


WHAT = {"images": "pictures or videos", "output": "cache"}


@dataclass
class CacheReport:
    """What was done.

    Args:
        plan: What there was to do.
        cache: The cache; None where only the plan was asked for.
    """

    plan: CachePlan
    cache: TeacherCache | None = None

    def table(self) -> str:
        """Error of each part, in Markdown."""
        if self.cache is None:
            return ""
        name = self.cache.manifest.codec["name"]
        lines = ["| part | codec | relative error | cosine |", "| --- | --- | ---: | ---: |"]
        for part, error in self.cache.errors.items():
            lines.append(
                f"| {part} | {name} | {error['relative_error']:.4%} | {error['cosine']:.6f} |"
            )
        return "\n".join(lines)


def run(arguments: CacheArguments) -> CacheReport:
    """Plan, then write what is missing of the cache."""
    on_cpu = arguments.device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu)
    needs_tracker = KINDS[arguments.kind][1].startswith("tracker")
    teacher = load_teacher(arguments.teacher, arguments.dtype, with_tracker=needs_tracker)
    teacher.to(arguments.device or state.device or "cpu")
    if arguments.compile:
        teacher.compile()
    writer = CacheWriter(
        arguments.output, read_samples(arguments), processor_of(teacher), teacher, arguments, state
    )
    plan = writer.plan()
    state.print(plan)
    if arguments.plan_only:
        return CacheReport(plan)
    if plan.bytes_to_write > plan.free_bytes:
        raise DiskFullError(
            f"The cache takes {plan.bytes_to_write / 1e9:,.2f} GB more, and "
            f"{plan.free_bytes / 1e9:,.2f} GB are free in {arguments.output}. Make room, or take "
            "another codec (--codec pca), or a part of the samples (--fraction 0.1)."
        )
    report = CacheReport(plan, writer.write())
    if arguments.verify and report.cache is not None and state.is_main_process:
        report.cache.verify()
    state.print(report.table())
    return report


def read_samples(arguments: CacheArguments) -> Samples:
    """The samples of the dataset."""
    data = DataSettings(
        format=arguments.format,
        root=arguments.images,
        split=arguments.split,
        annotations=arguments.annotations,
        tars=arguments.tars,
        fraction=arguments.fraction,
        subset_seed=arguments.subset_seed,
        clip_length=arguments.frames,
        clip_step=arguments.frame_step,
        clip_place="start",
    )
    samples = load_samples(data, arguments.samples)
    if not isinstance(samples, Samples):
        raise ValueError(f"Data of format {arguments.format!r} are made anew, not read: no cache.")
    return samples


def processor_of(teacher: Teacher) -> Any:
    """The transform of teacher and students, at the teacher's size."""
    if teacher.detector is not None:
        return zoo.processor(teacher.detector.config).image_processor
    return zoo.processor(zoo.config("sam3", image_size=teacher.image_size)).image_processor


def main(arguments: list[str] | None = None) -> None:
    """Read arguments from flags, or from a YAML file that flags may change, and run."""
    kind: Any = CacheArguments  # whose stub knows no dataclass
    parser = HfArgumentParser(kind, description=__doc__.splitlines()[0])
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--config"]:
        settings = yaml.safe_load(Path(given[1]).read_text())
        flags = [f"--{name}={value}" for name, value in settings.items() if value is not None]
        given = [*flags, *given[2:]]  # the last word counts
    (values,) = parser.parse_args_into_dataclasses(given, look_for_args_file=False)
    run(values)


if __name__ == "__main__":
    main()
