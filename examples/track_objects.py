"""Follow objects that are pointed at through a video.

    python examples/track_objects.py street.mp4 --model FOLDER --point 120 80 --point 300 90
    python examples/track_objects.py street.mp4 --model FOLDER --box 30 40 200 180 --frame 50 --both

FOLDER is a checkpoint with a tracker in it, as `from_pretrained` reads it, or a name on the Hub.
Each --point and each --box is an object of its own, in pixels of the frame given by --frame.
Frames are decoded, tracked and written one at a time; with --both the whole video is held.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import masks_to_boxes
from tqdm import tqdm

from efficientsam3_hf import EfficientSam3TrackerVideoModel, EfficientSam3TrackerVideoProcessor
from efficientsam3_hf.data.track_writers import open_writers
from efficientsam3_hf.data.video import open_video


@dataclass
class TrackedFrame:
    """The objects of one frame, as the writers take them."""

    frame_index: int
    object_ids: list[int]
    labels: list[str]
    scores: torch.Tensor
    boxes: torch.Tensor
    masks: torch.Tensor


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("video", help="video file, or folder of pictures")
    parser.add_argument("--model", required=True, help="checkpoint folder, or name on the Hub")
    parser.add_argument("--point", type=float, nargs=2, action="append", metavar=("X", "Y"))
    parser.add_argument(
        "--box", type=float, nargs=4, action="append", metavar=("X1", "Y1", "X2", "Y2")
    )
    parser.add_argument("--frame", type=int, default=0, help="frame that is pointed at")
    parser.add_argument("--both", action="store_true", help="also follow them back to the start")
    parser.add_argument("--memory", choices=["dense", "perceiver"], help="other than the folder's")
    parser.add_argument("--output", type=Path, help="overlay: .mp4 or .gif")
    parser.add_argument("--rle", type=Path, help="COCO RLE, as .json or .jsonl")
    parser.add_argument("--davis", type=Path, help="folder for PNGs in DAVIS layout")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if not (options.point or options.box):
        parser.error("say what to follow: --point or --box")
    if options.output is None and options.rle is None and options.davis is None:
        options.output = Path(f"{Path(options.video).with_suffix('')}.objects.mp4")
    return options


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Model and processor."""
    settings = {} if options.memory is None else {"memory": options.memory}
    model = EfficientSam3TrackerVideoModel.from_pretrained(options.model, **settings)
    processor = EfficientSam3TrackerVideoProcessor.from_pretrained(options.model)
    return model.eval().to(options.device), processor


def point_out(processor, session, frame_idx: int, options: argparse.Namespace) -> None:
    """Say what to follow."""
    for number, point in enumerate(options.point or [], start=1):
        processor.add_inputs_to_inference_session(
            session, frame_idx, number, input_points=[[[point]]], input_labels=[[[1]]]
        )
    for number, box in enumerate(options.box or [], start=len(options.point or []) + 1):
        processor.add_inputs_to_inference_session(session, frame_idx, number, input_boxes=[[box]])


def track_onward(options: argparse.Namespace) -> Iterator[tuple[TrackedFrame, np.ndarray]]:
    """Objects and picture of each frame from the one that is pointed at, as they are decoded."""
    model, processor = load(options)
    session = processor.init_video_session(inference_device=options.device)
    for frame in open_video(options.video, start=options.frame):
        frame_idx = processor.add_frame(session, frame.pixels)
        if frame_idx == 0:
            point_out(processor, session, 0, options)
        output = model(session, frame_idx=frame_idx)
        yield seen_in(frame.index, processor, session, output), frame.pixels


def track_both_ways(options: argparse.Namespace) -> Iterator[tuple[TrackedFrame, np.ndarray]]:
    """Objects and picture of each frame in order; holds the whole video, to go back in it."""
    model, processor = load(options)
    frames = [frame.pixels for frame in open_video(options.video)]
    session = processor.init_video_session(frames, inference_device=options.device)
    point_out(processor, session, options.frame, options)
    found = {
        output.frame_idx: seen_in(output.frame_idx, processor, session, output)
        for output in model.propagate_both_ways_iterator(session)
    }
    for index in sorted(found):
        yield found[index], frames[index]


def seen_in(index: int, processor, session, output) -> TrackedFrame:
    """The objects that are seen in a frame."""
    size = [[session.video_height, session.video_width]]
    masks = processor.post_process_masks([output.pred_masks], size)[0][:, 0].cpu()
    seen = masks.flatten(1).any(dim=1)
    object_ids = [i for i, is_seen in zip(output.object_ids, seen, strict=True) if is_seen]
    return TrackedFrame(
        index,
        object_ids,
        ["" for _ in object_ids],
        output.object_score_logits.flatten().cpu()[seen].sigmoid(),
        masks_to_boxes(masks[seen]),
        masks[seen],
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    results = track_both_ways(options) if options.both else track_onward(options)
    count = count_seen = 0
    try:
        with ExitStack() as stack:
            writers = open_writers(
                stack,
                Path(options.video).stem,
                open_video(options.video).fps or 24.0,
                options.output,
                options.rle,
                options.davis,
            )
            for result, pixels in tqdm(results, desc="tracking", unit="frame"):
                for writer in writers:
                    writer.write(result, pixels)
                count, count_seen = count + 1, count_seen + bool(result.object_ids)
    except (OSError, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{count} frames, objects seen in {count_seen}")
    for path in (options.output, options.rle, options.davis):
        if path:
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
