"""Follow objects that are pointed at through a video.

    python examples/track_objects.py street.mp4 --model FOLDER --point 120 80 --point 300 90
    python examples/track_objects.py street.mp4 --model FOLDER --box 30 40 200 180 --frame 50 --both

FOLDER is a checkpoint with a tracker in it, as `from_pretrained` reads it, or a name on the Hub.
Each --point and each --box is an object of its own, in pixels of the frame given by --frame.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

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


def track(frames: list[np.ndarray], options: argparse.Namespace) -> Iterator[TrackedFrame]:
    """Masks of the objects, frame by frame."""
    settings = {} if options.memory is None else {"memory": options.memory}
    model = EfficientSam3TrackerVideoModel.from_pretrained(options.model, **settings)
    model = model.eval().to(options.device)
    processor = EfficientSam3TrackerVideoProcessor.from_pretrained(options.model)
    session = processor.init_video_session(frames, inference_device=options.device)
    for number, point in enumerate(options.point or [], start=1):
        processor.add_inputs_to_inference_session(
            session, options.frame, number, input_points=[[[point]]], input_labels=[[[1]]]
        )
    for number, box in enumerate(options.box or [], start=len(options.point or []) + 1):
        processor.add_inputs_to_inference_session(
            session, options.frame, number, input_boxes=[[box]]
        )
    outputs = (
        model.propagate_both_ways_iterator(session)
        if options.both
        else model.propagate_in_video_iterator(session)
    )
    size = [[session.video_height, session.video_width]]
    for output in outputs:
        masks = processor.post_process_masks([output.pred_masks], size)[0][:, 0].cpu()
        seen = masks.flatten(1).any(dim=1)
        object_ids = [i for i, is_seen in zip(output.object_ids, seen, strict=True) if is_seen]
        yield TrackedFrame(
            output.frame_idx,
            object_ids,
            ["" for _ in object_ids],
            output.object_score_logits.flatten().cpu()[seen].sigmoid(),
            masks_to_boxes(masks[seen]),
            masks[seen],
        )


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        video = open_video(options.video)
        frames = [frame.pixels for frame in video]
        found = {
            result.frame_index: result
            for result in tqdm(track(frames, options), desc="tracking", unit="frame")
        }
        with ExitStack() as stack:
            for writer in open_writers(
                stack,
                Path(options.video).stem,
                video.fps or 24.0,
                options.output,
                options.rle,
                options.davis,
            ):
                for index in sorted(found):
                    writer.write(found[index], frames[index])
    except (OSError, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    seen = [index for index, result in found.items() if result.object_ids]
    print(f"{len(found)} frames, objects seen in {len(seen)}")
    for path in (options.output, options.rle, options.davis):
        if path:
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
