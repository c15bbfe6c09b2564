"""A concept model and a tracker on one trunk: what a stage trains, and what teaches it."""

import fnmatch
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

from .. import zoo
from ..models.checkpoint_layout import detector_weights, tracker_weights
from ..models.configuration_efficientsam3 import EfficientSam3Config
from ..models.memory_attention import EfficientSam3RotaryAttention
from ..models.modeling_efficientsam3 import EfficientSam3Model
from ..models.modeling_efficientsam3_tracker import EfficientSam3TrackerModel
from ..models.modeling_efficientsam3_tracker_video import (
    EfficientSam3TrackerVideoModel,
    tracker_video_config,
)
from ..models.object_memory import FrameFeatures
from ..models.perceiver_memory import EfficientSam3PerceiverAttention

Tracker = EfficientSam3TrackerModel | EfficientSam3TrackerVideoModel
Answer = TypeVar("Answer")

# Parts by name, for lists of what is to be trained.
PARTS = {
    "trunk": "detector.vision_encoder.backbone.trunk.*",
    "backbone": "detector.vision_encoder.backbone.*",
    "neck": "detector.vision_encoder.neck.*",
    "tracker_neck": "tracker.vision_encoder.neck.*",
    "text": "detector.text_*",
    "geometry": "detector.geometry_encoder.*",
    "encoder": "detector.detr_encoder.*",
    "decoder": "detector.detr_decoder.*",
    "scoring": "detector.dot_product_scoring.*",
    "masks": "detector.mask_decoder.*",
    "detector": "detector.*",
    "tracker": "tracker.*",
    "memory": "tracker.memory_*",  # attention, encoder and temporal positions
    "perceiver": "tracker.spatial_perceiver.*",
}
NORMS = (nn.modules.batchnorm._BatchNorm,)
# What leaves units out in training; the attentions as their configurations say.
DROPOUTS = (nn.Dropout, EfficientSam3RotaryAttention, EfficientSam3PerceiverAttention)


class Family(nn.Module):
    """A concept model, and a tracker beside it whose trunk is the concept model's.

    A trainer calls it as `family(step, ...)`, which runs `step(family, ...)`. So all that a stage
    computes happens within one forward of the module that DDP, FSDP or DeepSpeed has wrapped, and
    no gradient escapes them.

    Args:
        detector: The concept model.
        tracker: On images or in video. Its trunk is replaced by the detector's.
    """

    def __init__(self, detector: EfficientSam3Model, tracker: Tracker | None = None):
        super().__init__()
        self.detector = detector
        self.tracker = tracker
        if detector is not None and tracker is not None:
            tracker.vision_encoder.backbone = detector.vision_encoder.backbone
        self.freezes_norms = False
        self.drops_out = True
        self.name_or_path = ""  # where it came from, for records

    @classmethod
    def load(cls, folder: str | os.PathLike, **options: Any) -> "Family":
        """What a folder or Hub repository holds: the concept model, and the best tracker.

        Args:
            folder: As `from_pretrained` takes it.
            options: For `from_pretrained`, e.g. `dtype` or `revision`.
        """
        config = AutoConfig.from_pretrained(
            folder, **{name: options[name] for name in ("revision", "token") if name in options}
        )
        if not isinstance(config, EfficientSam3Config):
            raise ValueError(
                f"{os.fspath(folder)} holds a {config.model_type!r}, not a concept model of the "
                "family. Make a student with `efficientsam3_hf.distillation.new_student`, or give "
                "the folder of one."
            )
        tracker = None
        if config.tracker_video_config is not None:
            tracker = EfficientSam3TrackerVideoModel.from_pretrained(folder, **options)
        elif config.tracker_config is not None:
            tracker = EfficientSam3TrackerModel.from_pretrained(folder, **options)
        family = cls(EfficientSam3Model.from_pretrained(folder, **options), tracker)
        family.name_or_path = os.fspath(folder)
        return family

    def save(
        self,
        folder: str | os.PathLike,
        weights: Mapping[str, Tensor] | None = None,
        repo_id: str | None = None,
    ) -> Path:
        """Write the folder of the whole: configuration, weights, processor, card.

        Args:
            folder: Where to.
            weights: In place of the module's own, under its names; as FSDP gathers them.
            repo_id: Where the folder goes on the Hub, for the card.
        """
        whole = self if weights is None else self.carrying(weights)
        return zoo.save(whole.configuration, folder, whole.detector, whole.tracker, repo_id)

    def carrying(self, weights: Mapping[str, Tensor]) -> "Family":
        """A family that has other weights, and takes no memory besides: it computes nothing.

        Args:
            weights: All of them, under the module's own names.
        """
        kind: Any = EfficientSam3TrackerVideoModel if self.has_video else EfficientSam3TrackerModel
        with torch.device("meta"):
            detector = EfficientSam3Model(self.detector.config)
            tracker = None if self.tracker is None else kind(self.tracker.config)
        family = Family(detector, tracker)
        family.load_state_dict(weights, assign=True)
        return family

    def load_weights(self, folder: str | os.PathLike) -> None:
        """Take over the weights of a folder that `save` wrote."""
        stored: dict[str, Tensor] = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            if path.name.startswith("model"):
                stored |= load_file(path)
        weights = {f"detector.{name}": each for name, each in detector_weights(stored).items()}
        if self.tracker is not None:
            own = tracker_weights(stored)
            weights |= {f"tracker.{name}": each for name, each in own.items()}
        self.take(weights)

    def take(self, weights: Mapping[str, Tensor], strict: bool = True) -> None:
        """Take over weights, given whole, of which this process may have a part only.

        Args:
            weights: Under the module's own names.
            strict: Whether these must be all.
        """
        held = self.state_dict()
        placed = {name: placed_as(each, held.get(name, each)) for name, each in weights.items()}
        self.load_state_dict(placed, strict)

    def holding(self, weights: Mapping[str, Tensor]) -> "HeldWeights":
        """Within it, the module has other weights, given under its own names."""
        return HeldWeights(self, weights)

    # Not `config`: a `Trainer` would write into it what language models need.
    @property
    def configuration(self) -> EfficientSam3Config:
        """Of the concept model."""
        return self.detector.config

    @property
    def has_video(self) -> bool:
        """Whether the tracker remembers."""
        return isinstance(self.tracker, EfficientSam3TrackerVideoModel)

    def forward(self, step: Callable[..., Answer], *args: Any, **kwargs: Any) -> Answer:
        return step(self, *args, **kwargs)

    # What it sees.

    def see(self, pixel_values: Tensor) -> Sam3VisionEncoderOutput:
        """What the vision encoder makes of images, for the detector and for `tracker_features`."""
        pixel_values = pixel_values.to(self.detector.dtype)
        return self.detector.get_vision_features(pixel_values, return_dict=True)

    def see_again(self, tokens: Tensor) -> Sam3VisionEncoderOutput:
        """What `see` gives, for a model with SAM 3's ViT, out of the ViT's own output.

        Args:
            tokens: (images, tokens, channels).
        """
        tokens = tokens.to(self.detector.dtype)
        side = math.isqrt(tokens.shape[1])
        neck: Any = self.detector.vision_encoder.neck
        levels, positions = neck(tokens.transpose(1, 2).unflatten(2, (side, side)))
        return Sam3VisionEncoderOutput(
            last_hidden_state=tokens, fpn_hidden_states=levels, fpn_position_encoding=positions
        )

    def tracker_levels(self, seen: Sam3VisionEncoderOutput) -> tuple[Tensor, ...]:
        """The tracker's own pyramid out of the same look of the trunk."""
        if self.tracker is None:
            raise ValueError("This folder has no tracker: points and boxes have nothing to go to.")
        neck: Any = self.tracker.vision_encoder.neck
        if self.configuration.vision_config.model_type == "sam3_vision_model":
            height, width = seen.fpn_hidden_states[2].shape[-2:]
            tokens = seen.last_hidden_state.transpose(1, 2).unflatten(2, (height, width))
            levels, _ = neck(tokens)
            return levels
        return neck(seen.feature_maps)

    def tracker_features(self, seen: Sam3VisionEncoderOutput) -> FrameFeatures:
        """What the heads of a tracker, on images or in video, need of images."""
        fine, middle, coarse = self.tracker_levels(seen)[:3]
        tracker: Any = self.tracker
        decoder = tracker.mask_decoder
        return FrameFeatures(
            fine=decoder.conv_s0(fine),
            middle=decoder.conv_s1(middle),
            coarse=coarse,
            positions=seen.fpn_position_encoding[2][:1].flatten(2).transpose(1, 2),
        )

    # What is trained.

    def set_trainable(self, parts: Sequence[str], freeze_norms: bool = False) -> list[str]:
        """Train these parts alone; the rest stays in evaluation mode.

        Args:
            parts: Names in `PARTS`, or patterns of weights such as `"detector.mask_decoder.*"`.
            freeze_norms: Leave the statistics of batch norms as they are.

        Returns:
            The names of the weights that are trained.
        """
        weights = dict(self.named_parameters())
        # The neck's fourth level is read by nothing, and stays as it came.
        read = {name for name, weight in weights.items() if not is_unread(self, name)}
        chosen: set[str] = set()
        for part in parts:
            found = set(fnmatch.filter(weights, PARTS.get(part, part)))
            if not found:
                raise ValueError(
                    f"{part!r} names nothing to train in this model. Parts are "
                    f"{', '.join(PARTS)}; patterns look like 'detector.mask_decoder.*'."
                )
            chosen |= found & read
        for name, weight in weights.items():
            weight.requires_grad_(name in chosen)
        self.freezes_norms = freeze_norms
        self.train(self.training)
        return [name for name in weights if name in chosen]

    def train(self, mode: bool = True) -> "Family":
        """Training mode, but only for modules of which something is trained."""
        super().train(mode)
        if not mode:
            return self
        for module in self.modules():
            own = list(module.parameters())
            is_frozen = bool(own) and not any(weight.requires_grad for weight in own)
            is_still = (self.freezes_norms and isinstance(module, NORMS)) or (
                not self.drops_out and isinstance(module, DROPOUTS)
            )
            if is_frozen or is_still:
                module.eval()
        return self

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """As in transformers before 5.23, for both models."""
        for model in (self.detector, self.tracker):
            if model is not None and model.supports_gradient_checkpointing:
                model.gradient_checkpointing_enable(**options)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """As in transformers, for both models."""
        for model in (self.detector, self.tracker):
            if model is not None and model.supports_gradient_checkpointing:
                model.activation_checkpointing_enable(**options)


class HeldWeights:
    """A context in which a family has other weights; it gets its own back."""

    def __init__(self, family: Family, weights: Mapping[str, Tensor]):
        self.family, self.weights = family, weights
        self.own: dict[str, Tensor] = {}

    def __enter__(self) -> Family:
        held = self.family.state_dict()
        self.own = {name: held[name].detach().clone() for name in self.weights}
        self.family.take(self.weights, strict=False)
        return self.family

    def __exit__(self, *error: object) -> None:
        self.family.take(self.own, strict=False)


def placed_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor where another lies; shared out among processes if the other is."""
    tensor = tensor.to(other.device)
    if isinstance(other, DTensor) and not isinstance(tensor, DTensor):
        # Each process has the whole, and cuts its own part out.
        return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
    return tensor


def is_unread(family: Family, name: str) -> bool:
    """Whether a weight belongs to the level of SAM 3's neck that no head reads."""
    config = family.configuration.vision_config
    if config.model_type != "efficientsam3_vision" or config.neck != "sam3":
        return False
    unread = [
        f".neck.fpn_layers.{number}."
        for number, scale in enumerate(config.scale_factors)
        if scale < 1
    ]
    return any(part in name for part in unread)


def new_student(
    teacher: Any,
    variant: str | EfficientSam3Config,
    pretrained_trunk: bool = False,
    memory: str | None = None,
) -> Family:
    """A student that has every weight of its teacher it keeps; the rest starts fresh.

    Args:
        teacher: A SAM 3 of transformers or of this package, a folder or Hub name of one, or the
            `Family` of one.
        variant: Name in the zoo, or a configuration.
        pretrained_trunk: Start the trunk from timm's ImageNet weights.
        memory: Of the tracker in video: `"perceiver"`, `"dense"`, or None for what the
            configuration says.
    """
    config = zoo.config(variant) if isinstance(variant, str) else variant
    detector = EfficientSam3Model.from_teacher(
        getattr(teacher, "detector", teacher), config, pretrained_trunk=pretrained_trunk
    )
    has_tracker = config.tracker_config is not None or config.tracker_video_config is not None
    if not has_tracker or (isinstance(teacher, Family) and teacher.tracker is None):
        return Family(detector)
    fields = {} if memory is None else {"memory": memory}
    source: Any = getattr(teacher, "tracker", teacher)
    tracker = EfficientSam3TrackerVideoModel.from_teacher(
        source, tracker_video_config(config, **fields)
    )
    return Family(detector, tracker)
