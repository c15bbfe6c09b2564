"""The model that comes with the package: a miniature, for trying things out without a download."""

from pathlib import Path

NAME = "efficientsam3-miniature"

# What is said where it stands in for a model that nobody named.
NOTE = (
    "No model was given, so this is the miniature that comes with the package. It knows nothing "
    "but its own little world: 6 shapes, 6 colours, phrases like 'red circle'. For other pictures "
    "give a real model: {how}."
)


def embedded() -> Path:
    """The folder of the miniature, as `from_pretrained` takes it.

    It is an EfficientSAM3 of a few megabytes, distilled from a SAM 3 of its size in a synthetic
    world: made to try the package with, and of no use for photographs.
    """
    return Path(__file__).parent / "assets" / NAME
