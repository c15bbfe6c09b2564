"""Bytes, error and speed of each codec of the teacher's cache, and how long a student waits for it.

    python examples/benchmark_teacher_cache.py                     # a small random teacher
    python examples/benchmark_teacher_cache.py --teacher facebook/sam3 --device cuda --images photos

Speeds are of codecs alone, in pictures a second, on features of the teacher's size and of SAM 3's.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from efficientsam3_hf import (
    EfficientSam3Model,
    EfficientSam3VisionConfig,
    EfficientSam3VisionModel,
    zoo,
)
from efficientsam3_hf.data.collators import ImageCollator
from efficientsam3_hf.data.loading import Samples, load
from efficientsam3_hf.data.own_folder import OwnImages
from efficientsam3_hf.data.synthetic_writer import write_synthetic
from efficientsam3_hf.distillation.cache_command import processor_of
from efficientsam3_hf.distillation.cache_writer import CacheOptions, CacheWriter
from efficientsam3_hf.distillation.cached_features import CachedTeacherFeatures
from efficientsam3_hf.distillation.codecs import Codec, HalfCodec, Int8Codec, PcaFit, bytes_of
from efficientsam3_hf.distillation.teacher import Teacher, load_teacher

FULL_SIZE = (72 * 72, 1024)
# Name -> codec, and how many channels share a component.
CODECS = {
    "fp16": ("fp16", None),
    "int8": ("int8", None),
    "pca, 1/4": ("pca", 4),
    "pca, 1/8": ("pca", 8),
}


def small_teacher() -> EfficientSam3Model:
    """A random SAM 3 of eight layers on 24 × 24 tokens of 256 channels."""
    trunk = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "window_size": 8,
        "global_attn_indexes": [3, 7],
        "pretrain_image_size": 336,
    }
    torch.manual_seed(0)
    vision = {"backbone_config": trunk}
    text = {"num_hidden_layers": 1}
    config = zoo.config("sam3", vision_config=vision, text_config=text, image_size=336)
    return EfficientSam3Model(config)


def pictures_a_second(function: Callable[[], object], pictures: int, device: torch.device) -> float:
    """How fast something is, at its third time."""
    seconds = 0.0
    for _ in range(3):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return pictures / seconds


def speeds(codec: Codec, features: Tensor) -> tuple[float, float]:
    """Pictures a second that are encoded, and decoded."""
    stored = codec.encode(features)
    return (
        pictures_a_second(lambda: codec.encode(features), len(features), features.device),
        pictures_a_second(lambda: codec.decode(stored), len(features), features.device),
    )


def codec_rows(teacher: Teacher, samples: Samples, folder: Path) -> Iterator[str]:
    """One row for each codec, on what the teacher says of some pictures."""
    full = torch.randn(2, *FULL_SIZE, device=teacher.device)
    for name, (codec_name, share) in CODECS.items():
        channels = width_of(teacher)
        rank = share and channels // share
        settings = CacheOptions(codec=codec_name, rank=rank, num_workers=0)
        path = folder / codec_name / str(rank)
        cache = CacheWriter(path, samples, processor_of(teacher), teacher, settings).write()
        stored = cache.read(list(cache)[:8])["trunk"]
        codec = cache.codecs["trunk"]
        encoded, decoded = speeds(codec, codec.decode(stored).to(teacher.device))
        large = full_codec(codec_name, share and FULL_SIZE[1] // share)
        large_encoded, large_decoded = speeds(large, full)
        error = cache.errors["trunk"]
        yield (
            f"| {name} | {bytes_of(stored.values()):,} | {error['relative_error']:.3%} "
            f"| {error['cosine']:.6f} | {encoded:,.0f} | {decoded:,.0f} "
            f"| {bytes_of(large.encode(full[:1]).values()):,} "
            f"| {large_encoded:,.1f} | {large_decoded:,.1f} |"
        )


def width_of(teacher: Teacher) -> int:
    """Channels of the trunk's output."""
    return teacher.models.detector.vision_encoder.config.backbone_config.hidden_size


def full_codec(name: str, rank: int | None) -> Codec:
    """A codec for features of SAM 3's size."""
    if name != "pca":
        return HalfCodec() if name == "fp16" else Int8Codec()
    fit = PcaFit(FULL_SIZE[1])
    fit.add(torch.randn(1, 2 * FULL_SIZE[1], FULL_SIZE[1]))
    return fit.codec(rank=rank)


def waiting(teacher: Teacher, samples: Samples, folder: Path, workers: int, steps: int) -> str:
    """Steps a second of a student that learns from the cache and from the teacher itself."""
    processor = processor_of(teacher)
    settings = CacheOptions(codec="int8", num_workers=0)
    cache = CacheWriter(folder / "waiting", samples, processor, teacher, settings).write()
    cached = CachedTeacherFeatures(cache, ImageCollator(processor))
    size = teacher.image_size
    backbone = {"image_size": size, "hidden_size": width_of(teacher)}
    student = EfficientSam3VisionModel(EfficientSam3VisionConfig(backbone_config=backbone)).to(
        teacher.device
    )
    order = [number % len(samples) for number in range(4 * (steps + 2))]
    results = []
    for online in (False, True):
        collate = ImageCollator(processor) if online else cached
        loader = DataLoader(samples, 4, sampler=order, num_workers=workers, collate_fn=collate)
        batches = iter(loader)
        waited = start = 0.0
        for step in range(steps + 2):
            asked = time.perf_counter()
            batch = next(batches)
            if step == 2:  # the first ones start workers and warm up
                waited, start = 0.0, asked
            waited += time.perf_counter() - asked
            pixels = batch["pixel_values"].to(teacher.device)
            if online:
                target = teacher.features("trunk", pixels)["trunk"]
            else:
                stored = send_to_device(batch["teacher_features"], teacher.device)
                target = cached.cache.decode(stored)["trunk"]
            tokens = student.backbone(pixels).last_hidden_state
            (tokens - target).square().mean().backward()
        results.append((steps / (time.perf_counter() - start), waited, time.perf_counter() - start))
    (rate, waited, seconds), (online_rate, *_) = results
    return (
        f"A student of {student.config.backbone_config.trunk}: {rate:.2f} steps a second from the "
        f"cache, {waited / seconds:.1%} of the time waiting for data; {online_rate:.2f} with the "
        "teacher online."
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", help="folder or Hub name; a small random one if left out")
    parser.add_argument("--images", help="folder of pictures; synthetic scenes if left out")
    parser.add_argument("--count", type=int, default=32, help="of synthetic scenes")
    parser.add_argument("--dtype", default="float32", help="of the teacher")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="that read pictures")
    parser.add_argument("--steps", type=int, default=20, help="of the student")
    options = parser.parse_args(arguments)
    PartialState(cpu=options.device == "cpu")
    teacher = load_teacher(options.teacher or small_teacher(), options.dtype).to(options.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.images is None:
            write_synthetic(folder / "scenes", "sa1b", count=options.count, side=teacher.image_size)
        samples = load(OwnImages(options.images or str(folder / "scenes")))
        print("| codec | bytes | error | cosine | encoded/s | decoded/s |", end="")
        print(" bytes, full size | encoded/s | decoded/s |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for row in codec_rows(teacher, samples, folder):
            print(row, flush=True)
        print()
        print(waiting(teacher, samples, folder, options.workers, options.steps))


if __name__ == "__main__":
    main()
