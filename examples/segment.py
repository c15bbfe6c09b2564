"""Find a concept in a picture and draw what was found.

    python examples/segment.py street.jpg --model FOLDER --text "a red car" --text "a bicycle"
    python examples/segment.py street.jpg --model FOLDER --box 30 40 200 180
    python examples/segment.py street.jpg --model FOLDER --text wheel --point 120 80 --threshold 0.3

FOLDER is a checkpoint as `from_pretrained` reads it, or a name on the Hub. Boxes and points are
exemplars, in pixels: "things like the one here".
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor

import efficientsam3_hf  # noqa: F401  makes the Auto classes know the family
from efficientsam3_hf.models.image_processing_efficientsam3 import to_eight_bits, to_rgb
from efficientsam3_hf.visualize import draw_instances


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", type=Path, help="picture to search")
    parser.add_argument("--model", required=True, help="checkpoint folder, or name on the Hub")
    parser.add_argument("--text", action="append", help="phrase to find; may be given again")
    parser.add_argument(
        "--box", type=float, nargs=4, action="append", metavar=("X1", "Y1", "X2", "Y2")
    )
    parser.add_argument("--point", type=float, nargs=2, action="append", metavar=("X", "Y"))
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score to keep")
    parser.add_argument("--output", type=Path, help="overlay to write (default: IMAGE.found.png)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if not (options.text or options.box or options.point):
        parser.error("say what to find: --text, --box or --point")
    if options.text and len(options.text) > 1 and (options.box or options.point):
        parser.error("boxes and points go with one phrase; give --text once")
    return options


@torch.inference_mode()
def find(image: Image.Image, options: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Instances of each phrase."""
    model = AutoModel.from_pretrained(options.model).eval().to(options.device)
    processor = AutoProcessor.from_pretrained(options.model)
    inputs = processor(
        images=image,
        text=options.text,
        input_boxes=[options.box] if options.box else None,
        input_points=[options.point] if options.point else None,
    ).to(options.device)
    return processor.post_process_instance_segmentation(
        model(**inputs), threshold=options.threshold, target_sizes=inputs["original_sizes"]
    )


def draw(image: Image.Image, found: list[dict[str, Tensor]]) -> Image.Image:
    """The picture under coloured masks and boxes, a colour for each phrase."""
    pixels = to_rgb(to_eight_bits(image))  # as the model saw it, also of 16 bits or transparent
    image = Image.fromarray(pixels.byte().movedim(0, -1).numpy())
    for index, instances in enumerate(found):
        scores = instances["scores"]
        image = draw_instances(
            image,
            instances["masks"],
            instances["boxes"],
            captions=[f"{score:.2f}" for score in scores],
            numbers=[index] * len(scores),
        )
    return image


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        with Image.open(options.image) as opened:
            image = opened.copy()
    except OSError as error:
        print(f"{options.image} is not a picture that can be read: {error}", file=sys.stderr)
        return 2
    found = find(image, options)
    for phrase, instances in zip(options.text or ["like the exemplars"], found, strict=True):
        scores = ", ".join(f"{score:.2f}" for score in instances["scores"])
        print(f"{phrase}: {len(instances['scores'])} found ({scores})")
    output = options.output or options.image.with_suffix(".found.png")
    draw(image, found).save(output)
    print(f"Overlay: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
