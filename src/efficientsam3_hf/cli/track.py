"""`efficientsam3 track`: phrases, or objects that are pointed at, through a video."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from . import shared

HELP = """Follow every instance of a phrase, or objects that are pointed at, through a video.

```
efficientsam3 track examples/media/clip.mp4 --text "yellow square"
efficientsam3 track street.mp4 -m FOLDER --text "a red car" --text bicycle
efficientsam3 track street.mp4 -m FOLDER --box 30,40,200,180 --exemplars
efficientsam3 track frames/ -m FOLDER --point 120,80 --point 300,90 --frame 5
efficientsam3 track street.mp4 -m FOLDER --text person --rle tracks.jsonl --davis masks/
```

Without --text, each box and each point is an object of its own, in the frame given by --frame. With
--exemplars, the boxes show in the first frame what kind of thing to find. Frames are decoded,
tracked and written one at a time; models of transformers' own take the whole video at once.
"""


@dataclass
class FrameObjects:
    """The objects of one frame, as the writers take them."""

    frame_index: int
    object_ids: list[int]
    labels: list[str]
    scores: Any
    boxes: Any
    masks: Any


def track(
    video: Annotated[str, typer.Argument(help="Video file, or folder of pictures.")],
    model: shared.Model = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", help="Phrase to find. May be given again.")
    ] = None,
    box: shared.Boxes = None,
    point: shared.Points = None,
    exemplars: Annotated[
        bool, typer.Option("--exemplars", help='Boxes mean "things like this one".')
    ] = False,
    frame: Annotated[int, typer.Option(min=0, help="Frame that is pointed at.")] = 0,
    start: Annotated[int, typer.Option(min=0, help="First frame.")] = 0,
    stop: Annotated[int | None, typer.Option(min=1, help="Frame to stop before.")] = None,
    step: Annotated[int, typer.Option(min=1, help="Take every n-th frame.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Overlay, .mp4 or .gif: VIDEO.tracks.mp4.")
    ] = None,
    rle: Annotated[Path | None, typer.Option(help="COCO RLE, as .json or .jsonl.")] = None,
    davis: Annotated[Path | None, typer.Option(help="Folder of PNGs in DAVIS layout.")] = None,
    device: shared.Device = None,
    as_json: shared.Json = False,
) -> None:
    boxes = shared.numbers(box, "X1,Y1,X2,Y2", "--box")
    points = shared.numbers(point, "X,Y", "--point")
    if not (text or boxes or points):
        raise typer.BadParameter("say what to follow: --text, --box or --point")
    if text and points:
        raise typer.BadParameter("points name single objects: leave --text out")
    if exemplars and (points or not boxes):
        raise typer.BadParameter("--exemplars goes with --box, and not with --point")
    if boxes and text and len(text) > 1:
        raise typer.BadParameter("boxes go with one phrase: give --text once")

    from ..data.track_writers import open_writers
    from ..data.video import open_video

    frames = open_video(video, start, stop, step)
    shared.quiet()
    model, place = shared.check_model(model), shared.check_device(device)
    if text or exemplars:
        results = follow_concepts(model, place, frames, text, boxes)
    else:
        results = follow_objects(model, place, frames, boxes, points, frame)
    if output is None and rle is None and davis is None:
        output = Path(f"{Path(video).with_suffix('')}.tracks.mp4")
    seen: dict[str, dict[int, list[int]]] = {}
    count = 0
    with ExitStack() as stack:
        fps = (frames.fps or 24.0) / step
        writers = open_writers(stack, Path(video).stem, fps, output, rle, davis)
        for result, pixels in show_progress(results):
            count += 1
            for writer in writers:
                writer.write(result, pixels)
            for number, label in zip(result.object_ids, result.labels, strict=True):
                seen.setdefault(label, {}).setdefault(int(number), []).append(result.frame_index)
    written = [str(path) for path in (output, rle, davis) if path is not None]
    if as_json:
        objects = [
            {
                "label": label,
                "object_id": number,
                "first": where[0],
                "last": where[-1],
                "frames": len(where),
            }
            for label, of_label in seen.items()
            for number, where in of_label.items()
        ]
        shared.print_json({"frames": count, "objects": objects, "written": written})
        return
    for label, of_label in seen.items():
        typer.echo(f"{label or 'objects'}: {len(of_label)} ({', '.join(map(str, of_label))})")
    if not seen:
        typer.echo(f"Nothing was found in {count} frames.")
    for path in written:
        print(f"Written: {path}", file=sys.stderr)


def follow_concepts(
    name: str, device: str, video: Any, text: list[str] | None, boxes: list[list[float]]
) -> Iterator[tuple[Any, Any]]:
    """Every instance of phrases or of what is like the boxes, frame by frame, with the picture."""
    from ..benchmarks.loading import load

    loaded = load(name, "concept tracks", device)
    if hasattr(loaded.model, "stream"):
        stream = loaded.model.stream(video, text, boxes or None, processor=loaded.processor)
        for result in stream:
            yield result, result.pixels
        return
    if boxes:
        raise ValueError(f"{name} is transformers' own: give it phrases alone, by --text.")
    from ..benchmarks.videos import follow_concepts as follow

    frames = list(video)
    for index, result in follow(loaded, [each.pixels for each in frames], text or []):
        labels = {
            int(number): phrase
            for phrase, numbers in result["prompt_to_obj_ids"].items()
            for number in numbers
        }
        object_ids = [int(number) for number in result["object_ids"]]
        yield (
            FrameObjects(
                frames[index].index,
                object_ids,
                [labels[number] for number in object_ids],
                result["scores"],
                result["boxes"],
                result["masks"].bool(),
            ),
            frames[index].pixels,
        )


def follow_objects(
    name: str,
    device: str,
    video: Any,
    boxes: list[list[float]],
    points: list[list[float]],
    start: int,
) -> Iterator[tuple[Any, Any]]:
    """Objects that are pointed at in one frame, from there on, frame by frame, with the picture."""
    from ..benchmarks.loading import load

    loaded = load(name, "tracks", device)
    frames = (frame for frame in video if frame.index >= start)
    first = next(frames, None)
    if first is None or first.index != start:
        raise ValueError(
            f"There is no frame {start} among those that are taken: --frame counts as --start and "
            "--stop do."
        )
    frames = chain([first], frames)
    if type(loaded.model).__module__.startswith("transformers."):
        if boxes and points:  # the second call would forget the objects of the first
            raise ValueError(f"{name} is transformers' own: give it boxes or points, not both.")
        outputs = track_whole(loaded, frames, boxes, points)
    else:
        outputs = track_stream(loaded, frames, boxes, points)
    for frame, session, output in outputs:
        size = [[session.video_height, session.video_width]]
        masks = loaded.processor.post_process_masks([output.pred_masks], size)[0][:, 0].cpu()
        given = getattr(output, "object_ids", None)
        object_ids = list(session.obj_ids if given is None else given)
        scores = output.object_score_logits.flatten().float().cpu().sigmoid()
        yield seen_objects(frame.index, object_ids, scores, masks.bool()), frame.pixels


def track_stream(
    loaded: Any, frames: Iterable[Any], boxes: list[list[float]], points: list[list[float]]
) -> Iterator[tuple[Any, Any, Any]]:
    """Frame, session and output of each frame, which is then forgotten."""
    processor = loaded.processor
    session = processor.init_video_session(inference_device=loaded.device, dtype=loaded.dtype)
    for frame in frames:
        place = processor.add_frame(session, frame.pixels)
        if place == 0:
            point_out(processor, session, boxes, points)
        yield frame, session, loaded.model(session, frame_idx=place)


def track_whole(
    loaded: Any, frames: Iterable[Any], boxes: list[list[float]], points: list[list[float]]
) -> Iterator[tuple[Any, Any, Any]]:
    """The same, with the whole video in memory, as transformers' processors take it."""
    held = list(frames)
    session = loaded.processor.init_video_session(
        [each.pixels for each in held], inference_device=loaded.device, dtype=loaded.dtype
    )
    point_out(loaded.processor, session, boxes, points)
    for output in loaded.model.propagate_in_video_iterator(session, start_frame_idx=0):
        yield held[output.frame_idx], session, output


def point_out(
    processor: Any, session: Any, boxes: list[list[float]], points: list[list[float]]
) -> None:
    """Say in the first frame of a session what to follow: each box, each point is an object."""
    ids = list(range(1, len(boxes) + len(points) + 1))
    if boxes:
        processor.add_inputs_to_inference_session(
            session, 0, ids[: len(boxes)], input_boxes=[boxes]
        )
    if points:
        processor.add_inputs_to_inference_session(
            session,
            0,
            ids[len(boxes) :],
            input_points=[[[point] for point in points]],
            input_labels=[[[1] for _ in points]],
        )


def seen_objects(index: int, object_ids: list[int], scores: Any, masks: Any) -> FrameObjects:
    """The objects of one frame that have a pixel."""
    from torchvision.ops import masks_to_boxes

    seen = masks.flatten(1).any(dim=1)
    kept = [number for number, is_seen in zip(object_ids, seen, strict=True) if is_seen]
    boxes = masks_to_boxes(masks[seen])
    return FrameObjects(index, kept, ["" for _ in kept], scores[seen], boxes, masks[seen])


def show_progress(results: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """The same, with a bar on the screen that counts them."""
    from rich.console import Console
    from rich.progress import track as with_bar

    console = Console(stderr=True)
    return iter(with_bar(results, "tracking", console=console, disable=not console.is_terminal))
