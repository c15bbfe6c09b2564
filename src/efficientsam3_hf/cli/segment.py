"""`efficientsam3 segment`: what phrases, boxes and points name in a picture."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import shared

HELP = """Find every instance of a phrase, or of what looks like an example, in a picture.

```
efficientsam3 segment street.jpg -m FOLDER --text "a red car" --text bicycle
efficientsam3 segment street.jpg -m FOLDER --box 30,40,200,180
efficientsam3 segment street.jpg -m FOLDER --text wheel --point 120,80 --json
```

Writes the picture with masks over it. Boxes and points are exemplars: "things like the one here".
"""


def segment(
    picture: Annotated[Path, typer.Argument(help="Picture to search.")],
    model: shared.Model,
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

    from ..data.masks_rle import to_rle
    from ..pipelines import PromptableConceptSegmentationPipeline, open_image
    from ..visualize import draw_instances

    image = open_image(str(picture)).convert("RGB")
    shared.quiet()
    find = load_pipeline(model, shared.check_device(device), PromptableConceptSegmentationPipeline)
    exemplars = {"input_boxes": boxes or None, "input_points": points or None}
    phrases: Any = text[0] if text and len(text) == 1 else text
    found = find(
        image,
        text=phrases,
        threshold=threshold,
        **{name: value for name, value in exemplars.items() if value},
    )
    labels = list(dict.fromkeys([*(text or []), *(each["label"] for each in found)]))
    overlay = image
    if found:
        import numpy as np

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
        import numpy as np

        for each in found:
            mask = np.asarray(each.pop("mask")) > 0
            each["segmentation"] = to_rle(mask, mask.shape)
        shared.print_json({"overlay": str(path), "instances": found})
        return
    for label in labels:
        scores = [f"{each['score']:.2f}" for each in found if each["label"] == label]
        typer.echo(f"{label}: {len(scores)} found{f' ({chr(44).join(scores)})' if scores else ''}")
    if not found:
        typer.echo(f"Nothing scores above {threshold}. A lower --threshold shows more.")
    print(f"Overlay: {path}", file=sys.stderr)


def load_pipeline(name: str, device: str, pipeline_class: Any) -> Any:
    """The pipeline of a concept model of ours."""
    from ..benchmarks.loading import load

    loaded = load(name, "concepts", device)
    if not hasattr(loaded.model.config, "context_length"):
        raise ValueError(
            f"{name} is transformers' {type(loaded.model).__name__}: this command takes models of "
            "this family. `efficientsam3 evaluate` takes both."
        )
    return pipeline_class(model=loaded.model, processor=loaded.processor, device=device)
