"""`efficientsam3 segment`: what phrases, boxes and points name in a picture."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import shared

HELP = """Find every instance of a phrase, or of what looks like an example, in a picture.

```
efficientsam3 segment examples/media/scene.jpg --text "red star"
efficientsam3 segment street.jpg -m FOLDER --text "a red car" --text bicycle
efficientsam3 segment street.jpg -m FOLDER --box 30,40,200,180
efficientsam3 segment street.jpg -m FOLDER --text wheel --point 120,80 --json
```

Writes the picture with masks over it. Boxes and points are exemplars: "things like the one here".
"""


def segment(
    picture: Annotated[Path, typer.Argument(help="Picture to search.")],
    model: shared.Model = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", help="Phrase to find. May be given again.")
    ] = None,
    box: shared.Boxes = None,
    point: shared.Points = None,
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Keep instances that score above.")
    ] = 0.5,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Overlay to write: PICTURE.found.png.")
    ] = None,
    device: shared.Device = None,
    as_json: shared.Json = False,
) -> None:
    boxes = shared.numbers(box, "X1,Y1,X2,Y2", "--box")
    points = shared.numbers(point, "X,Y", "--point")
    if not (text or boxes or points):
        raise typer.BadParameter("say what to find: --text, --box or --point")
    if text and len(text) > 1 and (boxes or points):
        raise typer.BadParameter("boxes and points go with one phrase: give --text once")

    import numpy as np
    from PIL import Image

    from ..data.files import to_rgb
    from ..data.masks_rle import to_rle
    from ..pipelines import open_image
    from ..visualize import draw_instances

    image = Image.fromarray(to_rgb(open_image(str(picture))))
    shared.quiet()
    model = shared.check_model(model)
    found = find(model, shared.check_device(device), image, text or [], boxes, points, threshold)
    labels = list(dict.fromkeys([*(text or []), *(each["label"] for each in found)]))
    overlay = image
    if found:
        overlay = draw_instances(
            image,
            np.stack([np.asarray(each["mask"]) > 0 for each in found]),
            [list(each["box"].values()) for each in found],
            captions=[f"{each['label']} {each['score']:.2f}" for each in found],
            numbers=[labels.index(each["label"]) for each in found],
        )
    path = output or picture.with_suffix(".found.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    overlay.save(path)
    if as_json:
        for each in found:
            mask = np.asarray(each.pop("mask")) > 0
            each["segmentation"] = to_rle(mask, mask.shape)
        shared.print_json({"overlay": str(path), "instances": found})
        return
    for label in labels:
        scores = [f"{each['score']:.2f}" for each in found if each["label"] == label]
        shown = f" ({', '.join(scores)})" if scores else ""
        typer.echo(f"{label}: {len(scores)} found{shown}")
    if not found:
        typer.echo(f"Nothing scores above {threshold}. A lower --threshold shows more.")
    print(f"Overlay: {path}", file=sys.stderr)


def find(
    name: str,
    device: str,
    image: Any,
    phrases: list[str],
    boxes: list[list[float]],
    points: list[list[float]],
    threshold: float,
) -> list[dict[str, Any]]:
    """Instances as the pipeline gives them, of a model of this family or of transformers."""
    from ..benchmarks.loading import load

    loaded = load(name, "concepts", device)
    if type(loaded.model).__module__.startswith("transformers."):
        if boxes or points:
            raise ValueError(f"{name} is transformers' own: give it phrases alone, by --text.")
        return find_phrases(loaded, image, phrases, threshold)
    from ..pipelines import PromptableConceptSegmentationPipeline

    pipeline = PromptableConceptSegmentationPipeline(
        model=loaded.model, processor=loaded.processor, device=device
    )
    prompts: dict[str, Any] = {"text": phrases[0] if len(phrases) == 1 else phrases or None}
    prompts |= {"input_boxes": boxes or None, "input_points": points or None}
    given = {name: value for name, value in prompts.items() if value is not None}
    return pipeline(image, threshold=threshold, **given)


def find_phrases(
    loaded: Any, image: Any, phrases: list[str], threshold: float
) -> list[dict[str, Any]]:
    """The same for a model that the pipeline does not take."""
    import numpy as np

    from ..benchmarks.images import find_concepts

    (of_phrases,) = find_concepts(loaded, [np.array(image)], [phrases], threshold)
    found = [
        {
            "score": float(score),
            "label": phrase,
            "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), map(int, box), strict=True)),
            "mask": mask,
        }
        for phrase, each in zip(phrases, of_phrases, strict=True)
        for mask, score, box in zip(each.masks, each.scores, each.boxes_xyxy, strict=True)
    ]
    return sorted(found, key=lambda each: -each["score"])
