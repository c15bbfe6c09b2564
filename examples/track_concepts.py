"""Follow every instance of a concept through a video.

    python examples/track_concepts.py street.mp4 --model FOLDER --text "a red car" --text bicycle
    python examples/track_concepts.py frames/ --model FOLDER --text person --output people.mp4
    python examples/track_concepts.py street.mp4 --model FOLDER --box 30 40 200 180 --rle out.json

FOLDER is a checkpoint with a tracker in it, as `from_pretrained` reads it, or a name on the Hub.
Frames are decoded, tracked and written one at a time: memory does not grow with the video.
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

from efficientsam3_hf import EfficientSam3VideoModel
from efficientsam3_hf.data.track_writers import open_writers
from efficientsam3_hf.data.video import Video, open_video


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("video", help="video file, or folder of pictures")
    parser.add_argument("--model", required=True, help="checkpoint folder, or name on the Hub")
    parser.add_argument("--text", action="append", help="phrase to find; may be given again")
    parser.add_argument(
        "--box",
        type=float,
        nargs=4,
        action="append",
        metavar=("X1", "Y1", "X2", "Y2"),
        help='exemplar in the first frame, in pixels: "things like this one"',
    )
    parser.add_argument("--start", type=int, default=0, help="first frame")
    parser.add_argument("--stop", type=int, help="frame to stop before")
    parser.add_argument("--step", type=int, default=1, help="take every n-th frame")
    parser.add_argument("--threshold", type=float, help="lowest score of a detection")
    parser.add_argument("--new-threshold", type=float, help="lowest score that begins an object")
    parser.add_argument("--detect-every", type=int, help="look for new objects in every n-th frame")
    parser.add_argument("--delay", type=int, help="frames by which results come late (0: at once)")
    parser.add_argument(
        "--output", type=Path, help="overlay: .mp4 or .gif (default: VIDEO.tracks.mp4)"
    )
    parser.add_argument("--rle", type=Path, help="COCO RLE, as .json or .jsonl")
    parser.add_argument("--davis", type=Path, help="folder for PNGs in DAVIS layout")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if not (options.text or options.box):
        parser.error("say what to find: --text or --box")
    if options.box and options.text and len(options.text) > 1:
        parser.error("exemplars go with one phrase; give --text once")
    if options.output is None and options.rle is None and options.davis is None:
        options.output = Path(f"{Path(options.video).with_suffix('')}.tracks.mp4")
    return options


def track(video: Video, options: argparse.Namespace) -> dict[str, set[int]]:
    """Write what is found, frame by frame; gives the objects of each phrase."""
    settings = {
        "detect_every_nth_frame": options.detect_every,
        "score_threshold_detection": options.threshold,
        "new_det_thresh": options.new_threshold,
    }
    model = EfficientSam3VideoModel.from_pretrained(
        options.model, **{name: value for name, value in settings.items() if value is not None}
    )
    model = model.eval().to(options.device)
    found: dict[str, set[int]] = {}
    with ExitStack() as stack:
        writers = open_writers(
            stack,
            Path(options.video).stem,
            (video.fps or 24.0) / options.step,
            options.output,
            options.rle,
            options.davis,
        )
        results = model.stream(video, options.text, options.box, delay=options.delay)
        for result in tqdm(results, desc="tracking", unit="frame"):
            for writer in writers:
                writer.write(result, result.pixels)
            for object_id, label in zip(result.object_ids, result.labels, strict=True):
                found.setdefault(label, set()).add(object_id)
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        video = open_video(options.video, options.start, options.stop, options.step)
        found = track(video, options)
    except (OSError, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    for label, objects in found.items():
        print(f"{label}: {len(objects)} objects ({', '.join(map(str, sorted(objects)))})")
    if not found:
        print("nothing found")
    for path in (options.output, options.rle, options.davis):
        if path:
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
