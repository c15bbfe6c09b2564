"""What each part of a model costs: parameters, GFLOPs and milliseconds, on the device at hand.

    python examples/benchmark.py                       # the nine EfficientSAM3 variants
    python examples/benchmark.py efficientsam3-repvit-s efficientsam3-repvit-s-lateral
    python examples/benchmark.py --teacher --markdown benchmark.md   # with ratios to SAM 3

The image is noise and the weights are random (seed 0): time and FLOPs depend on neither. A FLOP is
a multiplication or an addition; only those of convolutions, matrix products and attention count.
"""

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop
from tqdm import tqdm
from transformers import AutoModel, Sam3Config, Sam3Model

from efficientsam3_hf import EfficientSam3Config, EfficientSam3Model, zoo
from efficientsam3_hf.benchmarks.where import best_device, hardware
from efficientsam3_hf.models.variants import TRUNKS

Config = EfficientSam3Config | Sam3Config
Model = EfficientSam3Model | Sam3Model
Costs = Mapping[str, float]

NINE_VARIANTS = [f"efficientsam3-{trunk}" for trunk in TRUNKS]
TEACHER = "Sam3Model of transformers"

# Module, its method, and the part that it is. A call inside another one counts only for itself, so
# the trunk is what remains of the backbone without `project`, which is its head and resize.
CALLS = (
    ("vision_encoder.backbone", "forward", "trunk"),
    ("vision_encoder.backbone", "project", "head"),
    ("vision_encoder.neck", "forward", "neck"),
    ("vision_encoder", "encode_positions", "neck"),
    ("", "get_text_features", "text"),
    ("geometry_encoder", "forward", "geometry"),
    ("detr_encoder", "forward", "encoder"),
    ("detr_decoder", "forward", "decoder"),
    ("detr_decoder.box_head", "forward", "decoder"),
    ("dot_product_scoring", "forward", "decoder"),
    ("mask_decoder", "forward", "mask head"),
)
# Start of a parameter's name, and its part; the first that fits counts.
PARAMETERS = {
    "vision_encoder.backbone.head.": "head",
    "vision_encoder.backbone.": "trunk",
    "vision_encoder.neck.": "neck",
    "text_": "text",
    "geometry_encoder.": "geometry",
    "detr_encoder.": "encoder",
    "detr_decoder.": "decoder",
    "dot_product_scoring.": "decoder",
    "mask_decoder.": "mask head",
}
OTHER = "other"  # what runs between the parts: no parameters, no FLOPs that count, little time
PARTS = (*dict.fromkeys(part for *_, part in CALLS), OTHER)

# torch counts the attention kernels of every device but Apple's.
FLOP_FORMULAS = {torch.ops.aten._scaled_dot_product_attention_math_for_mps: sdpa_flop}


@dataclass
class Measurement:
    """Cost of one model.

    Args:
        name: Name in the zoo, image size, and whether it was fused.
        total: `parameters`, also those this task leaves unused, `gflops`, median `milliseconds`
            from pixels to raw outputs, and `cached_milliseconds` from vision features to them.
        parts: The first three of these, by part; timed in passes of their own.
        ratios: How many times more than this model the teacher costs; empty without one.
    """

    name: str
    total: Costs
    parts: Mapping[str, Costs]
    ratios: Costs = field(default_factory=dict)


class Ledger:
    """Splits what a meter counts, be it time or FLOPs, between the parts that run meanwhile.

    Args:
        read: Gives the present state of the meter.
    """

    def __init__(self, read: Callable[[], float]):
        self.read = read
        self.amounts = dict.fromkeys(PARTS, 0.0)
        self.running = [OTHER]
        self.last = read()

    def settle(self) -> None:
        """Book what was counted since the last time on the part that ran."""
        now = self.read()
        self.amounts[self.running[-1]] += now - self.last
        self.last = now

    def charge(self, part: str, call: Callable) -> Callable:
        """A call like the one given, booked on a part."""

        @wraps(call)
        def charged(*args: Any, **kwargs: Any) -> Any:
            self.settle()
            self.running.append(part)
            result = call(*args, **kwargs)
            self.settle()
            self.running.pop()
            return result

        return charged


def split(model: Model, run: Callable[[], Any], read: Callable[[], float]) -> dict[str, float]:
    """What a meter counts while `run` calls the model, by part."""
    ledger = Ledger(read)
    with ExitStack() as patches:
        for path, method, part in CALLS:
            module = model.get_submodule(path)
            if hasattr(module, method):  # transformers' vision encoder lacks some of ours
                charged = ledger.charge(part, getattr(module, method))
                patches.enter_context(patch.object(module, method, charged))
        run()
    ledger.settle()
    return ledger.amounts


def count_flops(model: Model, run: Callable[[], Any]) -> dict[str, float]:
    """FLOPs of each part while `run` calls the model."""
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        return split(model, run, counter.get_total_flops)


def count_parameters(model: Model) -> dict[str, int]:
    """Parameters of each part."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        part = next((PARAMETERS[start] for start in PARAMETERS if name.startswith(start)), OTHER)
        counts[part] += parameter.numel()
    return counts


def clock(device: torch.device) -> float:
    """Milliseconds, read once the device has done its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return 1000 * time.perf_counter()


def predict(model: Model, inputs: dict[str, Any]) -> Any:
    """Raw outputs of every phrase for one image."""
    if not isinstance(model, Sam3Model):
        return model(**inputs)
    # transformers' model takes one phrase an image, so it is called once for each of them.
    vision = inputs.get("vision_embeds") or model.get_vision_features(inputs["pixel_values"])
    phrases = zip(inputs["input_ids"].split(1), inputs["attention_mask"].split(1), strict=True)
    return [model(vision_embeds=vision, input_ids=i, attention_mask=m) for i, m in phrases]


def build(config: Config, options: argparse.Namespace) -> Model:
    """A model with random weights."""
    torch.manual_seed(0)
    with options.device:
        model = AutoModel.from_config(
            config, dtype=getattr(torch, options.dtype), attn_implementation=options.attention
        )
    trunk = getattr(config.vision_config.backbone_config, "trunk", "")  # a ViT has none
    if options.fuse and trunk.startswith("repvit"):
        model.fuse()
    return model.eval().requires_grad_(False)


def make_inputs(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """An image of noise, and phrases padded to the model's context length."""
    processor = zoo.processor("sam3" if isinstance(config, Sam3Config) else config)
    phrases = processor(text=["a yellow school bus"] * options.prompts)
    size = (1, 3, config.image_size, config.image_size)
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return {
        "pixel_values": noise.to(options.device, getattr(torch, options.dtype)),
        "input_ids": phrases["input_ids"].to(options.device),
        "attention_mask": phrases["attention_mask"].to(options.device),
    }


def measure_parts(
    model: Model, inputs: dict[str, Any], options: argparse.Namespace, progress: tqdm
) -> dict[str, Costs]:
    """Costs by part, the times from passes that wait for the device between parts."""
    run = partial(predict, model, inputs)
    flops = count_flops(model, run)  # also warms up the passes to come
    progress.update()
    passes = []
    for _ in range(options.repeats):
        passes.append(split(model, run, partial(clock, options.device)))
        progress.update()
    return {
        "parameters": count_parameters(model),
        "gflops": {part: flops[part] / 1e9 for part in PARTS},
        "milliseconds": {
            part: statistics.median(times[part] for times in passes) for part in PARTS
        },
    }


def median_time(run: Callable[[], Any], options: argparse.Namespace, progress: tqdm) -> float:
    """Median milliseconds of a call."""
    times = []
    for _ in range(options.warmup + options.repeats):
        start = clock(options.device)
        run()
        times.append(clock(options.device) - start)
        progress.update()
    return statistics.median(times[options.warmup :])


@torch.no_grad()
def measure(name: str, config: Config, options: argparse.Namespace, progress: tqdm) -> Measurement:
    """Cost of a model and of its parts."""
    model, inputs = build(config, options), make_inputs(config, options)
    parts = measure_parts(model, inputs, options, progress)
    total = {kind: sum(parts[kind].values()) for kind in ("parameters", "gflops")}
    forward = predict
    if options.compile:
        torch.compiler.reset()  # else every further model counts as a recompilation of the first
        forward = torch.compile(predict)
    total["milliseconds"] = median_time(partial(forward, model, inputs), options, progress)
    inputs["vision_embeds"] = model.get_vision_features(inputs.pop("pixel_values"))
    total["cached_milliseconds"] = median_time(partial(forward, model, inputs), options, progress)
    fused = getattr(config.vision_config.backbone_config, "fused", False)
    label = f"{name}, {config.image_size} px" + fused * ", fused"
    return Measurement(label, total, parts)


def measure_all(configs: dict[str, Config], options: argparse.Namespace) -> list[Measurement]:
    """Measure one model after the other, with a line about each as soon as it is done."""
    measurements = []
    passes = 1 + options.repeats + 2 * (options.warmup + options.repeats)
    with tqdm(total=passes * len(configs), unit="pass", disable=None) as progress:
        for name, config in configs.items():
            progress.set_description(name)
            measurements.append(measure(name, config, options, progress))
            gc.collect()  # modules refer to each other; two models at once may not fit
            costs = (f"{kind} {show(cost)}" for kind, cost in measurements[-1].total.items())
            progress.write(f"{measurements[-1].name}: {', '.join(costs)}", file=sys.stderr)
    if options.teacher:
        teacher = measurements[-1].total  # `main` puts it last
        for row in measurements:
            row.ratios = {kind: teacher[kind] / row.total[kind] for kind in teacher}
    return measurements


def show(cost: float) -> str:
    """A number as the tables have it; only parameters are whole numbers."""
    return f"{cost / 1e6:.2f} M" if isinstance(cost, int) else f"{cost:.1f}"


def table(title: str, costs: Mapping[str, Costs]) -> str:
    """A Markdown table, a row for each model, that also reads well in a terminal."""
    kinds = next(iter(costs.values()))
    rows = [["model", *kinds], *([name, *map(show, row.values())] for name, row in costs.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = [f"{title}:", ""]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def to_markdown(measurements: list[Measurement], run: dict[str, Any]) -> str:
    """All tables, below the command that made them and where it ran."""
    header = (
        "`{command}` on {device}, {threads} CPU threads, torch {torch}, transformers "
        "{transformers}; {dtype}, {attention} attention, random weights; one image, phrases: "
        "{prompts}, timed passes: {repeats}."
    )
    total = {row.name: row.total for row in measurements}
    sections = [
        header.format(**run),
        table("From pixels, or cached vision features, to raw outputs", total),
    ]
    if measurements[-1].ratios:
        ratios = {row.name: row.ratios for row in measurements}
        sections.append(table(f"How many times more {TEACHER} costs in the same run", ratios))
    for kind, title in (
        ("parameters", "Parameters"),
        ("gflops", "GFLOPs"),
        ("milliseconds", "Milliseconds, in passes apart and never compiled"),
    ):
        sections.append(table(title, {row.name: row.parts[kind] for row in measurements}))
    return "\n\n".join(sections) + "\n"


def describe_run(arguments: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """All options, the command that set them, and where it ran."""
    return {
        **vars(options),
        "command": shlex.join(["python", "examples/benchmark.py", *arguments]),
        "device": hardware(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def configure(name: str, image_size: int | None) -> Config:
    """Configuration of a variant, at an image size that it can take."""
    config = zoo.config(name) if image_size is None else zoo.config(name, image_size=image_size)
    vision_config, size = config.vision_config, config.image_size
    is_vit = vision_config.model_type != "efficientsam3_vision"  # the others check their own
    if is_vit and size % vision_config.backbone_config.patch_size:
        raise ValueError(f"The ViT of {name} takes sides that are multiples of 14, not {size}.")
    return config


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names_help = "names in the zoo, also with -lateral or -ctxN (default: the nine variants)"
    add("names", nargs="*", metavar="NAME", default=NINE_VARIANTS, help=names_help)
    add("--teacher", action="store_true", help=f"also {TEACHER} at 1008 pixels, and ratios to it")
    add("--device", type=device, default=best_device(), help="(default here: %(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--attention", default="sdpa", choices=["sdpa", "eager"])
    add("--image-size", type=at_least(1), metavar="N", help="pixels (default: each model's own)")
    add("--prompts", type=at_least(1), default=1, metavar="N", help="phrases for the one image")
    add("--fuse", action="store_true", help="fold the branches of RepViT into one convolution")
    add("--compile", action="store_true", help="torch.compile what is timed from end to end")
    add("--threads", type=at_least(1), metavar="N", help="CPU threads (default: as torch chooses)")
    add(
        "--warmup",
        type=at_least(0),
        default=1,
        metavar="N",
        help="passes before those timed (default: 1)",
    )
    add("--repeats", type=at_least(1), default=5, metavar="N", help="passes to time (default: 5)")
    add("--json", type=Path, metavar="FILE", help="write all numbers there")
    add("--markdown", type=Path, metavar="FILE", help="write the tables there")
    return parser


def device(text: str) -> torch.device:
    """A device of this machine."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return torch.device(text)


def at_least(least: int) -> Callable[[str], int]:
    """A whole number that is not too small."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return number


def main(arguments: Sequence[str]) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    for file in filter(None, (options.json, options.markdown)):
        if not file.parent.is_dir():  # better now than after an hour
            parser.error(f"{file} cannot be written: there is no folder {file.parent}")
    try:
        configs = {name: configure(name, options.image_size) for name in options.names}
    except ValueError as error:
        parser.error(str(error))
    if options.teacher:
        configs[TEACHER] = Sam3Config()
    if options.threads:
        torch.set_num_threads(options.threads)

    measurements, run = measure_all(configs, options), describe_run(arguments, options)
    tables = to_markdown(measurements, run)
    print(tables)
    if options.markdown:
        options.markdown.write_text(tables)
    if options.json:
        report = {"run": run, "models": [asdict(row) for row in measurements]}
        options.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
