"""How long a model takes from the file to masks on the host, stage by stage."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.samples import ImageSample
from ..evaluation import speed, units
from .images import (
    PointedImages,
    detect,
    finish,
    prepare_images,
    select_candidates,
)
from .loading import Loaded, can_do, load, load_once
from .subsets import Subset
from .tasks import Outcome, Task

PHRASE = "an object"  # for pictures that come without


class SpeedTask(Task):
    """Milliseconds of each stage, one image and one prompt at a time.

    Args:
        prompt: "phrase" or "box", the middle of the image; None takes phrases where the model can.
        warm_up: Laps that each process runs before it counts.
    """

    name = "speed"
    formats = ("coco", "lvis", "roboflow", "saco", "sa1b", "own")
    metrics = ("total/p50", "total/p95", "vision/p50", "heads/p50", "rate", "memory MB")
    kind = "image-segmentation"
    options = ("prompt", "warm_up")
    scale = 1.0
    decimals = 1
    batch_size = 1
    reads_itself = True
    prompt: str | None = None
    warm_up = 3

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "prompt": self.prompt, "warm_up": self.warm_up}

    def load(self, model: str, device: str, dtype: str) -> Loaded:
        load_once.cache_clear()  # a model of another task would count as memory of this one
        prompt = self.prompt or ("phrase" if can_do(model, "concepts") else "box")
        return load(model, {"phrase": "concepts", "box": "objects"}[prompt], device, dtype)

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.costs: dict[str, float] = {}  # of the model, once it has run

    def run(
        self,
        loaded: Loaded,
        subset: Subset,
        keys: Sequence[str],
        samples: Sequence[Callable[[], ImageSample | None]],
        folder: Path,
    ) -> list[Outcome]:
        outcomes = []
        for key, read in zip(keys, samples, strict=True):
            if not self.costs:
                for _ in range(self.warm_up):
                    lap(loaded, read, speed.Stopwatch(loaded.device))
                self.costs = self.measure_costs(loaded, read)
            watch = speed.Stopwatch(loaded.device, warm_up=0)
            with speed.memory_peak(loaded.device) as peak:
                was_read = lap(loaded, read, watch)
            if not was_read:
                outcomes.append(Outcome(key, was_skipped=True))
                continue
            outcomes.append(
                Outcome(key, [{**watch.laps[0], **self.costs, "memory": peak["bytes"]}])
            )
        return outcomes

    def measure_costs(self, loaded: Loaded, read: Callable[[], ImageSample | None]) -> dict:
        """Parameters of the model, and operations of one lap."""
        operations = speed.count_operations(
            lambda: lap(loaded, read, speed.Stopwatch(loaded.device))
        )
        return {
            "parameters": float(speed.count_parameters(loaded.model)),
            "operations": float(operations),
        }

    def summarize(self, table: units.Units, weights: np.ndarray) -> Mapping[str, float]:
        costs = ("parameters", "operations", "memory")
        stages = {name: values for name, values in table.items() if name not in costs}
        drawn = weights > 0
        return {
            **speed.summarize(stages, weights),
            "memory MB": float(table["memory"][drawn].max()) / 1e6,
            "parameters M": float(table["parameters"].max()) / 1e6,
            "GFLOPs": float(table["operations"].max()) / 1e9,
        }


@torch.inference_mode()
def lap(loaded: Loaded, read: Callable[[], ImageSample | None], watch: speed.Stopwatch) -> bool:
    """One image from its file to masks; whether it could be read."""
    with watch.stage("decode"):
        sample = read()
    if sample is None or sample.image is None:
        return False
    size = (sample.image.shape[0], sample.image.shape[1])
    with watch.stage("preprocess"):
        pixel_values = prepare_images(loaded, [sample.image])
    if hasattr(loaded.model, "get_image_embeddings"):
        with watch.stage("vision"):
            images = PointedImages(loaded, [size], pixel_values)
        with watch.stage("heads"):
            height, width = size
            box = [width * 0.25, height * 0.25, width * 0.75, height * 0.75]
            outputs = images.decode(0, {"input_boxes": [[box]]}, multimask_output=False)
        with watch.stage("masks"):
            images.resize(0, outputs.pred_masks)
    else:
        phrases = [query.phrase for query in sample.queries if query.phrase]
        with watch.stage("vision"):
            features = loaded.model.get_vision_features(pixel_values)
        with watch.stage("heads"):
            outputs = detect(loaded, features, 0, [phrases[0] if phrases else PHRASE])
        with watch.stage("masks"):
            finish(loaded, select_candidates(loaded, outputs, 0, 0.5, None), size, 1)
    watch.lap()
    return True
