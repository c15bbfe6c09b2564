"""A moving average of the weights that are trained."""

import os
from collections.abc import Mapping

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from .family import placed_as

EMA_FILE = "ema.safetensors"


class MovingAverage(TrainerCallback):
    """Keeps an average of trained weights, and of the statistics beside them.

    In the first steps, when there is little to average, it follows closely: the decay of step n is
    at most (1 + n) / (10 + n).

    Args:
        model: Whose weights to follow; not wrapped.
        decay: Share of the old in the new average.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.weights = {name: tensor.detach().clone() for name, tensor in self.followed().items()}

    def followed(self) -> Mapping[str, Tensor]:
        """The weights that change in training, and floating-point buffers."""
        trained = {
            name: weight for name, weight in self.model.named_parameters() if weight.requires_grad
        }
        statistics = {
            name: buffer
            for name, buffer in self.model.state_dict().items()
            if name.endswith(("running_mean", "running_var"))
        }
        return {**trained, **statistics}

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Take a step towards the weights."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        followed = self.followed()
        averages = [placed_as(self.weights[name], tensor) for name, tensor in followed.items()]
        self.weights = dict(zip(followed, averages, strict=True))
        own = [own_part(each) for each in averages]
        targets = [
            own_part(each.detach()).to(mine)
            for each, mine in zip(followed.values(), own, strict=True)
        ]
        torch._foreach_lerp_(own, targets, 1 - decay)

    def save(self, folder: str | os.PathLike, is_writer: bool = True) -> None:
        """Write the average beside a checkpoint. All processes take part, and one writes."""
        tensors = {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name, tensor in self.weights.items()
        }
        if is_writer:
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(tensors, os.path.join(folder, EMA_FILE))

    def load(self, folder: str | os.PathLike) -> None:
        """Go on with the average that lies beside a checkpoint."""
        path = os.path.join(folder, EMA_FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{folder} has no {EMA_FILE}: it was trained without a moving average. Resume it "
                "with ema_decay=0."
            )
        stored = load_file(path)
        if stored.keys() != self.weights.keys():
            raise ValueError(f"{path} averages other weights than those that are trained now.")
        self.weights = stored


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: all of it, unless it is shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
