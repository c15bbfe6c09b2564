"""Pictures of what a student makes of the same few samples, on the way."""

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

SIDE = 192  # pixels of a map in a picture


class DrawPictures(TrainerCallback):
    """Draws what `trainer.draw` says of a few samples, into `pictures/` of the output.

    TensorBoard shows them, too, where it is among those that are reported to.

    Args:
        trainer: A `DistillationTrainer`.
        every: Steps between pictures.
        samples: How many samples.
    """

    def __init__(self, trainer: Any, every: int, samples: int):
        self.trainer, self.every, self.samples = trainer, every, samples
        self.batch: dict[str, Any] | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Choose the samples: the first that can be used."""
        trainer = self.trainer
        dataset = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
        datasets = dataset.values() if isinstance(dataset, Mapping) else [dataset]
        samples = []
        for each in datasets:
            usable = (sample for sample in samples_of(each) if sample is not None)
            samples += islice(usable, self.samples)
        collate = trainer.eval_collator or trainer.data_collator
        self.batch = collate(samples)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Draw, if it is time."""
        if state.global_step % self.every == 0:
            self.draw(state.global_step)

    def draw(self, step: int) -> None:
        """Write the pictures of a step."""
        trainer = self.trainer
        pictures = trainer.draw_batch(self.batch)
        if not trainer.is_world_process_zero():
            return
        folder = Path(trainer.output_dir, "pictures", f"step-{step:06d}")
        folder.mkdir(parents=True, exist_ok=True)
        for title, picture in pictures.items():
            name = file_name(title)
            picture.save(folder / f"{name}.png")
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                    callback.tb_writer.add_image(
                        f"pictures/{name}", np.asarray(picture), step, dataformats="HWC"
                    )


def samples_of(dataset: Any) -> Iterator[Any]:
    """The samples one after another, by number where they have one."""
    if isinstance(dataset, IterableDataset):
        return iter(dataset)
    return (dataset[index] for index in range(len(dataset)))


def file_name(title: str) -> str:
    """A title without what no file's name may have, and no longer than one may be.

    >>> file_name("0 salt/pepper shaker")
    '0 salt pepper shaker'
    """
    return re.sub(r"[^\w.-]+", " ", title)[:60].strip()


def draw_maps(pixel_values: Tensor, teacher: Tensor, student: Tensor) -> Image.Image:
    """A row for each image: the picture, the teacher's map, the student's.

    Colours are the three main components of the teacher's features, over all images.

    Args:
        pixel_values: (images, 3, height, width) as the image processor makes them.
        teacher: Maps (images, channels, height, width).
        student: Likewise, of any height and width.
    """
    teacher, student = teacher.float(), student.float()
    tokens = teacher.movedim(1, -1).flatten(0, 2)  # (places of all images, channels)
    mean = tokens.mean(dim=0)
    # By hand, as torch's low-rank ones draw random numbers, which would change the training.
    _, vectors = torch.linalg.eigh((tokens - mean).T @ (tokens - mean))
    basis = vectors[:, -3:].flip(1)
    basis = basis * basis.gather(0, basis.abs().argmax(dim=0)[None]).sign()
    colours = (tokens - mean) @ basis
    low, high = (colours.quantile(share, dim=0) for share in (0.02, 0.98))

    def colour(maps: Tensor) -> Tensor:
        components = (maps.movedim(1, -1) - mean) @ basis
        shades = (components - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
        return F.interpolate(shades.movedim(-1, 1), (SIDE, SIDE), mode="nearest")

    picture = F.interpolate(pixel_values.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
    shades = torch.cat([picture * 0.5 + 0.5, colour(teacher), colour(student)], dim=3)
    return to_picture(shades.movedim(1, -1).flatten(0, 1))


def draw_similarities(teacher: Tensor, student: Tensor) -> Image.Image:
    """Cosines between all pairs of vectors: the teacher's, and beside them the student's.

    White is 1, black is the teacher's least.

    Args:
        teacher: Vectors (number, channels).
        student: Likewise.
    """
    pairs = [F.normalize(each.float(), dim=-1) for each in (teacher, student)]
    cosines = torch.stack([vectors @ vectors.T for vectors in pairs])
    least = cosines[0].min()
    shades = (cosines - least) / (1 - least).clamp(min=torch.finfo(torch.float32).tiny)
    shades = F.interpolate(shades[None], (2 * SIDE, 2 * SIDE), mode="nearest")[0]
    return to_picture(torch.cat(list(shades), dim=1)[..., None].expand(-1, -1, 3))


def to_picture(shades: Tensor) -> Image.Image:
    """Values (height, width, 3) from 0 to 1 as a picture; those outside are cut off."""
    return Image.fromarray((shades.clamp(0, 1) * 255).round().byte().cpu().numpy())
