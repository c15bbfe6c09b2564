"""Golden values of the reference implementation: prompts, inputs, and what came of them.

A case is a folder with `meta.json` (the prompts in full, how to make the input, and of each tensor
its shape and the steps it was sampled with) and `golden.safetensors`.
"""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F


class GoldenCase:
    """One case on disk.

    Args:
        folder: Where `meta.json` and `golden.safetensors` are.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        for name in ("meta.json", "golden.safetensors"):
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"{self.folder} holds no {name}: it is no golden case.")

    @cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.folder / "meta.json").read_text())

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta["tensors"])

    def __contains__(self, name: str) -> bool:
        return name in self.meta["tensors"]

    def values(self, name: str) -> Tensor:
        """The stored values: the whole tensor, or a sample of it."""
        with safe_open(self.folder / "golden.safetensors", "pt") as file:
            return file.get_tensor(name)

    def sample(self, name: str, tensor: Tensor) -> Tensor:
        """The elements of a whole tensor that the case has stored."""
        about = self.meta["tensors"][name]
        if list(tensor.shape) != about["full_shape"]:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, but {about['full_shape']} in "
                f"{self.folder.name}: the folder holds another variant than the case."
            )
        steps = tuple(slice(None, None, step) for step in about["steps"])
        return tensor[steps].detach().clone()

    def pixel_values(self) -> Tensor:
        """The image that concept prompts are about, as the model takes it."""
        recipe = self.meta["input"]
        if recipe["kind"] != "noise_image":
            raise ValueError(f"{self.folder.name} has an input of kind {recipe['kind']!r}.")
        pixels = make_noise_image(**recipe["args"])
        return (pixels.float() / 255 - 0.5)[None] / 0.5

    def photograph(self, name: str) -> Image.Image:
        """An image that lies with the case, or with several of them in a folder above."""
        for folder in (self.folder, *self.folder.absolute().parents[:3]):
            if (folder / name).is_file():
                return Image.open(folder / name).convert("RGB")
        raise FileNotFoundError(f"{name} lies neither in {self.folder} nor in a folder above it.")


def make_noise_image(
    height: int,
    width: int,
    seed: int,
    octaves: list[tuple[int, float]],
    grain: float,
    gain: float,
    level: float,
) -> Tensor:
    """Smooth random colours (3, height, width) in 0..255: noise at several scales, and grain.

    Args:
        height: Rows.
        width: Columns.
        seed: Of the generator.
        octaves: (cells along a side, amplitude) of each scale.
        grain: Amplitude of noise on single pixels.
        gain: Factor before clamping.
        level: Added after it.
    """
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(3, height, width)
    for cells, amplitude in octaves:
        coarse = torch.randn(1, 3, cells, cells, generator=generator)
        fine = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
        image += amplitude * fine[0]
    image += grain * torch.randn(3, height, width, generator=generator)
    return (image * gain + level).clamp(0, 255).to(torch.uint8)
