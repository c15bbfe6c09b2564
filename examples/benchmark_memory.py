"""What video memory costs at full size: SAM 3's dense memory against the Perceiver's.

    python examples/benchmark_memory.py
    python examples/benchmark_memory.py --image-size 504 --objects 3 --frames 5

Weights are random (seed 0), and so are the features of the frames: the trunk is left out, since it
is the same for both. One frame is the memory attention over 7 memories and 16 object pointers, the
mask decoder, and the memory encoder (with the Perceiver), for all objects in one batch.
"""

import argparse
import platform
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from efficientsam3_hf import EfficientSam3TrackerVideoConfig, EfficientSam3TrackerVideoModel, zoo
from efficientsam3_hf.models.object_memory import FrameFeatures
from efficientsam3_hf.models.tracker_video_parts import MemoryBatch

MEMORIES = ("dense", "perceiver")
POINTERS = 16


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image-size", type=int, default=1008, help="side of the input, in pixels")
    parser.add_argument("--memories", type=int, default=7, help="remembered frames")
    parser.add_argument("--objects", type=int, default=1, help="objects in a frame")
    parser.add_argument("--frames", type=int, default=3, help="timed frames; the median counts")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def build(memory: str, options: argparse.Namespace) -> EfficientSam3TrackerVideoModel:
    """A tracker without its vision encoder."""
    vision = zoo.config("efficientsam3-repvit-s", image_size=options.image_size).vision_config
    config = EfficientSam3TrackerVideoConfig(vision_config=vision.to_dict(), memory=memory)
    torch.manual_seed(0)
    return EfficientSam3TrackerVideoModel(config, remove_vision_encoder=True).eval()


def track_one_frame(
    model: EfficientSam3TrackerVideoModel,
    features: FrameFeatures,
    memory: MemoryBatch,
) -> torch.Tensor:
    """All that is done for a frame after the vision encoder."""
    coarse = model.with_memory(features.coarse, features.positions, memory, POINTERS)
    prediction = model.predict_masks(features, coarse)
    is_prompted = torch.zeros(len(coarse), dtype=torch.bool, device=coarse.device)
    masks = model.memory_masks(prediction.high_res_masks, is_prompted)
    return model.encode_memories(features.coarse, masks, prediction.object_score_logits)


def make_inputs(
    model: EfficientSam3TrackerVideoModel, options: argparse.Namespace
) -> tuple[FrameFeatures, MemoryBatch]:
    """Random features of a frame, and random memories of its objects."""
    grid, rows, device = model.config.grid_size, options.objects, options.device
    tokens = model.config.tokens_per_memory
    features = FrameFeatures(
        torch.randn(1, 32, 4 * grid, 4 * grid, device=device),
        torch.randn(1, 64, 2 * grid, 2 * grid, device=device),
        torch.randn(1, 256, grid, grid, device=device),
        torch.randn(1, grid * grid, 256, device=device),
    )
    ago = torch.arange(options.memories, device=device).expand(rows, -1)
    memory = MemoryBatch(
        features=torch.randn(rows, options.memories, tokens, 64, device=device),
        offsets=ago,
        pointers=torch.randn(rows, POINTERS, 256, device=device),
        pointer_offsets=torch.arange(1, POINTERS + 1, device=device).expand(rows, -1),
    )
    return features, memory


@torch.inference_mode()
def measure(memory: str, options: argparse.Namespace) -> dict[str, float]:
    """GFLOPs of the attention and of a frame, milliseconds, and size of a memory."""
    model = build(memory, options).to(options.device)
    features, remembered = make_inputs(model, options)
    with FlopCounterMode(display=False) as counter:
        model.with_memory(features.coarse, features.positions, remembered, POINTERS)
    attention = counter.get_total_flops() / 1e9
    with FlopCounterMode(display=False) as counter:  # warms up as well
        tokens = track_one_frame(model, features, remembered)
    times = []
    for _ in tqdm(range(options.frames), desc=memory, leave=False):
        synchronize(options.device)
        start = time.perf_counter()
        track_one_frame(model, features, remembered)
        synchronize(options.device)
        times.append(1000 * (time.perf_counter() - start))
    return {
        "tokens a memory": tokens.shape[1],
        "kB a memory": tokens[0].nbytes / 1000,
        "attention GFLOPs": attention,
        "frame GFLOPs": counter.get_total_flops() / 1e9,
        "frame ms": statistics.median(times),
    }


def synchronize(device: str) -> None:
    """Wait for the GPU, where there is one."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    figures = {memory: measure(memory, options) for memory in MEMORIES}
    print(
        f"{options.objects} object(s), {options.memories} memories, {options.image_size} px, on "
        f"{platform.processor() or platform.machine()} ({options.device}, "
        f"{torch.get_num_threads()} threads), torch {torch.__version__}, float32"
    )
    print(f"| {'':16} | {'dense':>9} | {'perceiver':>9} | {'ratio':>6} |")
    print(f"| {'---':16} | {'---:':>9} | {'---:':>9} | {'---:':>6} |")
    for name in figures["dense"]:
        dense, perceiver = figures["dense"][name], figures["perceiver"][name]
        print(f"| {name:16} | {dense:9.1f} | {perceiver:9.1f} | {dense / perceiver:6.1f} |")
    return 0


if __name__ == "__main__":
    main()
