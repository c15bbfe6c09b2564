"""Steps a second of stage 1 for images, from a cache and from the teacher itself.

    python examples/benchmark_stage1.py                            # a small random teacher
    python examples/benchmark_stage1.py --teacher facebook/sam3 --images photos --batch 32 \\
        --student efficientsam3-tinyvit-s --workers 12

Beside them: the share of time that a step waits for its batch. Both are what the trainer logs.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers.utils import logging

from efficientsam3_hf import EfficientSam3Model, EfficientSam3VisionConfig, zoo
from efficientsam3_hf.data.loading import load
from efficientsam3_hf.data.own_folder import OwnImages
from efficientsam3_hf.data.synthetic_writer import write_synthetic
from efficientsam3_hf.distillation.cache_command import processor_of
from efficientsam3_hf.distillation.cache_writer import CacheOptions, CacheWriter
from efficientsam3_hf.distillation.launch import prepare
from efficientsam3_hf.distillation.teacher import load_teacher

SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
WINDOWS = {"window_size": 8, "pretrain_image_size": 336, "global_attn_indexes": [3, 7]}


def write_small_models(folder: Path) -> None:
    """A random SAM 3 of eight layers on 24 × 24 tokens, and the configuration of a student."""
    torch.manual_seed(0)
    trunk = {**SIZES, **WINDOWS, "num_hidden_layers": 8}
    text = {"text_config": {"num_hidden_layers": 1}, "image_size": 336}
    config = zoo.config("sam3", vision_config={"backbone_config": trunk}, **text)
    config.tracker_config = config.tracker_video_config = None
    zoo.save(config, folder / "teacher", EfficientSam3Model(config))
    backbone = {"trunk": "efficientvit_b0", "hidden_size": SIZES["hidden_size"], "image_size": 336}
    config.vision_config = EfficientSam3VisionConfig(backbone_config=backbone)
    zoo.save(config, folder / "student")


def write_cache(folder: Path, teacher: str, images: str, options: argparse.Namespace) -> None:
    """What the teacher says of all pictures."""
    loaded = load_teacher(teacher, options.dtype).to(options.device)
    settings = CacheOptions(codec=options.codec, num_workers=options.workers)
    CacheWriter(folder, load(OwnImages(images)), processor_of(loaded), loaded, settings).write()


def measure(flags: list[str], steps: int) -> dict[str, float]:
    """What the trainer logs of the second half of its steps."""
    settings = {
        "training.max_steps": 2 * steps,
        "training.logging_steps": steps,
        "training.save_strategy": "no",
        "training.disable_tqdm": "true",
    }
    words = [f"--{name}={value}" for name, value in settings.items()]
    trainer = prepare(None, ["--stage=stage1_image", "--data.augment=none", *words, *flags]).trainer
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry][-1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", help="folder or Hub name; a small random one if left out")
    parser.add_argument("--student", help="variant of the zoo; a small one if left out")
    parser.add_argument("--images", help="folder of pictures; synthetic scenes if left out")
    parser.add_argument("--count", type=int, default=64, help="of synthetic scenes")
    parser.add_argument("--side", type=int, default=336, help="of synthetic scenes, in pixels")
    parser.add_argument("--codec", default="int8", help="of the cache")
    parser.add_argument("--dtype", default="float32", help="of the teacher")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1, help="that read pictures")
    parser.add_argument("--steps", type=int, default=20, help="to measure, after as many more")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.teacher is None:
            write_small_models(folder)
        if options.images is None:
            write_synthetic(folder / "scenes", "sa1b", count=options.count, side=options.side)
        teacher = options.teacher or str(folder / "teacher")
        images = options.images or str(folder / "scenes")
        write_cache(folder / "cache", teacher, images, options)
        flags = [
            f"--teacher.name={teacher}",
            f"--teacher.dtype={options.dtype}",
            "--teacher.tracker=false",
            f"--student.name={options.student or folder / 'student'}",
            "--student.pretrained_trunk=false",
            f"--data.root={images}",
            f"--training.output_dir={folder / 'output'}",
            f"--training.use_cpu={options.device == 'cpu'}",
            f"--training.per_device_train_batch_size={options.batch}",
            f"--training.dataloader_num_workers={options.workers}",
        ]
        cached = measure([*flags, f"--teacher.cache={folder / 'cache'}"], options.steps)
        online = measure(flags, options.steps)
    print("| targets | steps/s | pictures/s | waiting for data |")
    print("| --- | ---: | ---: | ---: |")
    for name, entry in ((f"cache, {options.codec}", cached), ("teacher online", online)):
        rate, waiting = entry["samples_per_second"], entry["waiting_for_data"]
        print(f"| {name} | {rate / options.batch:.2f} | {rate:.2f} | {waiting:.1%} |")


if __name__ == "__main__":
    main()
