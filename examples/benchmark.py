"""What each part of a model costs: parameters, GFLOPs and milliseconds, on whatever device there is.

    python examples/benchmark.py                       # the nine EfficientSAM3 variants
    python examples/benchmark.py efficientsam3-repvit-s efficientsam3-repvit-s-lateral
    python examples/benchmark.py --teacher --markdown benchmark.md   # with ratios against SAM 3

The image is noise and the weights are random (seed 0): time and FLOPs depend on neither.
"""

import argparse
import functools
import gc
import json
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from efficientsam3_hf import zoo
from efficientsam3_hf.models.variants import TRUNKS
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop
from tqdm import tqdm
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, Sam3Config, Sam3Model

NINE_VARIANTS = [f"efficientsam3-{trunk}" for trunk in TRUNKS]
TEACHER = "Sam3Model of transformers"

PARTS = ("trunk", "head", "neck", "text", "geometry", "encoder", "decoder", "mask head")
OTHER = "other"  # what runs between the parts: no parameters, no FLOPs that count, little time

# Module, its method, and the part that both belong to. A call inside another one counts only for
# itself, so the trunk is what remains of the backbone without `project`, its head and resize.
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
# Start of a parameter's name and its part; the first that fits counts.
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
# PyTorch counts the attention kernels of all devices but Apple's.
FLOP_FORMULAS = {torch.ops.aten._scaled_dot_product_attention_math_for_mps: sdpa_flop}


@dataclass
class Cost:
    """Cost of one part: all its parameters, 10^9 FLOPs (a multiply-add is two), median time."""

    parameters: int
    gflops: float
    milliseconds: float


@dataclass
class Measurement:
    """Cost of one model.

    Args:
        name: Name in the zoo.
        image_size: Side of the square image in pixels.
        parameters: All of the model, also those that this task leaves unused.
        gflops: From pixels to raw outputs.
        milliseconds: From pixels to raw outputs, median.
        milliseconds_cached: The same with the vision features of the image at hand.
        parts: Cost of each part, timed in passes apart.
        less_than_teacher: How many times less than the teacher the model costs.
    """

    name: str
    image_size: int
    parameters: int
    gflops: float
    milliseconds: float
    milliseconds_cached: float
    parts: dict[str, Cost]
    less_than_teacher: dict[str, float] = field(default_factory=dict)


class Ledger:
    """Splits what a meter counts, be it time or FLOPs, between the parts that run meanwhile.

    Args:
        read: Gives the present state of the meter.
    """

    def __init__(self, read: Callable[[], float]):
        self.read = read
        self.amounts = dict.fromkeys([*PARTS, OTHER], 0.0)
        self.running = [OTHER]
        self.last = read()

    def settle(self) -> None:
        """Book what was counted since the last time on the part that ran."""
        now = self.read()
        self.amounts[self.running[-1]] += now - self.last
        self.last = now

    def charge(self, part: str, call: Callable) -> Callable:
        """A call like the one given, booked on a part."""

        @functools.wraps(call)
        def charged(*args: Any, **kwargs: Any) -> Any:
            self.settle()
            self.running.append(part)
            result = call(*args, **kwargs)
            self.settle()
            self.running.pop()
            return result

        return charged


def split(
    model: PreTrainedModel, run: Callable[[], Any], read: Callable[[], float]
) -> dict[str, float]:
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


def count_flops(model: PreTrainedModel, run: Callable[[], Any]) -> dict[str, float]:
    """FLOPs of each part in convolutions, matrix products and attention."""
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        return split(model, run, counter.get_total_flops)


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of each part."""
    counts = dict.fromkeys([*PARTS, OTHER], 0)
    for name, parameter in model.named_parameters():
        part = next((PARAMETERS[start] for start in PARAMETERS if name.startswith(start)), OTHER)
        counts[part] += parameter.numel()
    return counts


def clock(device: torch.device) -> float:
    """Milliseconds, read once the device has done its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return 1000 * time.perf_counter()


def predict(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    """Raw outputs of every phrase for one image."""
    if not isinstance(model, Sam3Model):
        return model(**inputs)
    # transformers' model takes one phrase for an image: called again, it reuses vision features.
    vision = inputs.get("vision_embeds") or model.get_vision_features(inputs["pixel_values"])
    phrases = zip(inputs["input_ids"].split(1), inputs["attention_mask"].split(1))
    return [model(vision_embeds=vision, input_ids=i, attention_mask=m) for i, m in phrases]


def build(config: PreTrainedConfig, options: argparse.Namespace) -> PreTrainedModel:
    """A model of random weights."""
    torch.manual_seed(0)
    with options.device:
        model = AutoModel.from_config(
            config, dtype=options.dtype, attn_implementation=options.attention
        )
    if options.fuse and is_repvit(config):
        model.fuse()
    return model.eval().requires_grad_(False)


def is_repvit(config: PreTrainedConfig) -> bool:
    """Whether the model has branches that can be fused."""
    return getattr(config.vision_config.backbone_config, "trunk", "").startswith("repvit")


def make_inputs(config: PreTrainedConfig, options: argparse.Namespace) -> dict[str, Any]:
    """An image of noise, and phrases of the model's context length."""
    processor = zoo.processor("sam3" if isinstance(config, Sam3Config) else config)
    inputs = processor(text=["a yellow school bus"] * options.prompts)
    noise = torch.randn(
        1, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0)
    )
    return {
        "pixel_values": noise.to(options.device, options.dtype),
        "input_ids": inputs["input_ids"].to(options.device),
        "attention_mask": inputs["attention_mask"].to(options.device),
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


def measure_parts(
    model: PreTrainedModel, inputs: dict[str, Any], options: argparse.Namespace, progress: tqdm
) -> dict[str, Cost]:
    """Count and time each part, in passes that wait for the device between parts."""
    parameters = count_parameters(model)
    run = functools.partial(predict, model, inputs)
    flops = count_flops(model, run)  # also the warm-up of the passes that follow
    progress.update()
    passes = []
    for _ in range(options.repeats):
        passes.append(split(model, run, functools.partial(clock, options.device)))
        progress.update()
    medians = {part: statistics.median(times[part] for times in passes) for part in flops}
    return {part: Cost(parameters[part], flops[part] / 1e9, medians[part]) for part in flops}


@torch.no_grad()
def measure(
    name: str, config: PreTrainedConfig, options: argparse.Namespace, progress: tqdm
) -> Measurement:
    """Count and time one model."""
    model = build(config, options)
    inputs = make_inputs(config, options)
    parts = measure_parts(model, inputs, options, progress)

    forward = torch.compile(predict) if options.compile else predict
    torch.compiler.reset()  # else the graph of each model counts as a recompilation of the last
    milliseconds = median_time(functools.partial(forward, model, inputs), options, progress)
    inputs["vision_embeds"] = model.get_vision_features(inputs.pop("pixel_values"))
    cached = median_time(functools.partial(forward, model, inputs), options, progress)
    return Measurement(
        name=f"{name} (fused)" if options.fuse and is_repvit(config) else name,
        image_size=config.image_size,
        parameters=sum(cost.parameters for cost in parts.values()),
        gflops=sum(cost.gflops for cost in parts.values()),
        milliseconds=milliseconds,
        milliseconds_cached=cached,
        parts=parts,
    )


def measure_all(
    configs: dict[str, PreTrainedConfig], options: argparse.Namespace
) -> list[Measurement]:
    """Measure one model after the other, with a line about each as soon as it is done."""
    measurements = []
    passes = 1 + options.repeats + 2 * (options.warmup + options.repeats)
    with tqdm(total=passes * len(configs), unit="pass", disable=None) as progress:
        for name, config in configs.items():
            progress.set_description(name)
            measurement = measure(name, config, options, progress)
            gc.collect()  # modules refer to each other; two models at once may not fit
            measurements.append(measurement)
            line = ", ".join(f"{value} {key}" for key, value in show_total(measurement).items())
            progress.write(f"{measurement.name}: {line}", file=sys.stderr)
    if options.teacher:
        for measurement in measurements:
            measurement.less_than_teacher = compare(measurement, measurements[-1])
    return measurements


def compare(measurement: Measurement, teacher: Measurement) -> dict[str, float]:
    """How many times less than the teacher a model costs."""
    fields = ("parameters", "gflops", "milliseconds", "milliseconds_cached")
    return {name: getattr(teacher, name) / getattr(measurement, name) for name in fields}


def show_total(measurement: Measurement) -> dict[str, str]:
    """Cost of a whole model, as shown."""
    return {
        "pixels": str(measurement.image_size),
        "M parameters": f"{measurement.parameters / 1e6:.2f}",
        "GFLOPs": f"{measurement.gflops:.1f}",
        "ms": f"{measurement.milliseconds:.1f}",
        "ms, image cached": f"{measurement.milliseconds_cached:.1f}",
    }


def table(title: str, measurements: list[Measurement], show: Callable) -> str:
    """A Markdown table, one row a model, that also reads well in a terminal.

    Args:
        title: What stands above it.
        measurements: Its rows.
        show: Gives the columns of a row, by their names.
    """
    rows = [{"model": row.name, **show(row)} for row in measurements]
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    rule = {key: "-" * (width - 1) + ":" for key, width in widths.items()}
    rule["model"] = "-" * widths["model"]
    lines = []
    for row in [dict(zip(widths, widths)), rule, *rows]:
        first, *others = (row[key].rjust(width) for key, width in widths.items())
        lines.append(" | ".join(["| " + row["model"].ljust(len(first)), *others]) + " |")
    return "\n".join([title, "", *lines])


def to_markdown(measurements: list[Measurement], run: dict[str, Any]) -> str:
    """All tables, below the command that made them and where it ran."""
    switches = "".join(f", {switch}" for switch in ("compiled", "fused") if run[switch])
    header = (
        f"`{run['command']}` on {run['device']} with {run['threads']} CPU threads, torch "
        f"{run['torch']}, transformers {run['transformers']}. {run['dtype']}, {run['attention']}"
        f"{switches}; one image, {run['prompts']} phrase(s), median of {run['repeats']} passes after "
        f"{run['warmup']} to warm up; {run['weights']}."
    )
    sections = [header, table("From pixels to raw outputs:", measurements, show_total)]
    if measurements[-1].less_than_teacher:
        title = f"How many times less that is than {TEACHER}, in the same run:"
        sections.append(table(title, measurements, show_ratios))
    formats = {"parameters": "M parameters", "gflops": "GFLOPs", "milliseconds": "Milliseconds"}
    for name, title in formats.items():
        note = ", each part on its own (never compiled)" if name == "milliseconds" else ""
        show = functools.partial(show_parts, name)
        sections.append(table(f"{title}{note}:", measurements, show))
    return "\n\n".join(sections) + "\n"


def show_ratios(measurement: Measurement) -> dict[str, str]:
    """Ratios to the teacher, as shown."""
    labels = ("parameters", "GFLOPs", "ms", "ms, image cached")
    return {
        label: f"{ratio:.1f}"
        for label, ratio in zip(labels, measurement.less_than_teacher.values())
    }


def show_parts(name: str, measurement: Measurement) -> dict[str, str]:
    """One kind of cost of each part, as shown."""
    scale, digits = (1e6, 2) if name == "parameters" else (1, 1)
    parts = measurement.parts
    return {part: f"{getattr(parts[part], name) / scale:.{digits}f}" for part in parts}


def describe_run(options: argparse.Namespace) -> dict[str, Any]:
    """What one needs to know to repeat a run."""
    return {
        "command": options.command,
        "device": device_name(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(options.dtype).removeprefix("torch."),
        "attention": options.attention,
        "compiled": options.compile,
        "fused": options.fuse,
        "prompts": options.prompts,
        "warmup": options.warmup,
        "repeats": options.repeats,
        "weights": "random weights (seed 0)",
    }


def device_name(device: torch.device) -> str:
    """Name of the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, Python knows no more than the architecture
    if cpuinfo.exists() and (match := re.search(r"model name\s*: (.+)", cpuinfo.read_text())):
        return match[1]
    return f"{platform.processor() or platform.machine()} ({device.type})"


def best_device() -> str:
    """CUDA before Apple's GPU before the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
