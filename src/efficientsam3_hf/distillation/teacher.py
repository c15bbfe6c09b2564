"""The teacher: any SAM 3, frozen, run through this package's own forward.

teacher = load_teacher("facebook/sam3", dtype="bfloat16").prepare(accelerator)
features = teacher.features("trunk", pixel_values)  # {"trunk": (images, tokens, channels)}
outputs = teacher(lambda models: models.detector(pixel_values, input_ids=ids))
"""

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.sam3.modeling_sam3 import (
    Sam3SinePositionEmbedding,
    Sam3VisionEncoderOutput,
    Sam3ViTLayer,
)

from ..models.configuration_efficientsam3 import EfficientSam3Config
from ..models.configuration_efficientsam3_video import EfficientSam3TrackerVideoConfig
from ..models.modeling_efficientsam3 import EfficientSam3Model
from ..models.modeling_efficientsam3_tracker_video import EfficientSam3TrackerVideoModel
from ..models.modeling_efficientsam3_video import EfficientSam3VideoModel
from ..models.object_memory import FrameFeatures
from .family import Family

Result = TypeVar("Result")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Where most of the weights are. The rest is small, and gathered as one.
LARGE_LAYERS = (Sam3ViTLayer, CLIPEncoderLayer)


class TeacherModels(Family):
    """Concept model and tracker in video on one trunk; one of them may be missing.

    Whatever is computed is a step run inside `forward`, so that a wrapper which gathers weights
    (FSDP, ZeRO-3) sees the call.
    """

    def __init__(
        self, detector: EfficientSam3Model | None, tracker: EfficientSam3TrackerVideoModel | None
    ):
        whole: Any = detector  # which a family has in any case
        super().__init__(whole, tracker)


class Teacher:
    """A frozen SAM 3. No module, so that its weights are in nothing that holds it.

    Args:
        detector: Concept model; None for a tracker alone.
        tracker: Tracker in video with dense memory; None for a concept model alone. With both, they
            share the detector's trunk.
        dtype: Precision to compute in.
        name: Where it came from, for messages and records.
    """

    def __init__(
        self,
        detector: EfficientSam3Model | None,
        tracker: EfficientSam3TrackerVideoModel | None = None,
        dtype: torch.dtype = torch.float32,
        name: str = "",
    ):
        models = TeacherModels(detector, tracker).eval().requires_grad_(False)
        self.hashes = weight_hashes(models)  # before the cast, which must not tell
        cast_weights(models, dtype)
        self.models = models
        self.detector, self.tracker = detector, tracker
        self.dtype, self.name = dtype, name
        self.device = torch.device("cpu")
        self.module: nn.Module = models  # later with whatever wraps it

    def __call__(self, step: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Run `step(models, *args, **kwargs)` on the concept model and the tracker.

        Outputs are ordinary tensors without gradients, so that a loss may keep them. They are in
        the teacher's own precision, also where the student's forward, in another one, asks.
        """
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.module(step, *args, **kwargs)

    def see(self, pixel_values: Tensor) -> Sam3VisionEncoderOutput:
        """As `Family.see`."""
        return self(Family.see, pixel_values)

    def tracker_features(self, seen: Sam3VisionEncoderOutput) -> FrameFeatures:
        """As `Family.tracker_features`."""
        return self(Family.tracker_features, seen)

    def features(self, kind: str, pixel_values: Tensor) -> dict[str, Tensor]:
        """What a student is to reach in some images, under the names of its parts.

        Args:
            kind: One of `KINDS`.
            pixel_values: (images, 3, height, width), as the image processor makes them.

        Returns:
            Tokens (images, tokens, channels), row by row, for each part.
        """
        self.part_of(kind)
        return self(KINDS[kind][0], pixel_values.to(self.device, self.dtype))

    def fingerprint(self, kind: str) -> str:
        """Hash of configuration and weights of the part that features of a kind come from.

        Weights count as bfloat16 has them: a model in float32 and its copy in bfloat16 are one
        teacher, on whatever device.
        """
        part = self.part_of(kind)
        module: Any = self.models.get_submodule(part)
        settings = own_settings(module.config)
        lines = [f"{name} {value}" for name, value in sorted(self.hashes.items())]
        weights = [line for line in lines if line.startswith(f"{part}.")]
        text = json.dumps([settings, weights], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def part_of(self, kind: str) -> str:
        """Name of the module that features of a kind come from."""
        if kind not in KINDS:
            kinds = ", ".join(KINDS)
            raise ValueError(f"There are no features of kind {kind!r}; kinds are {kinds}.")
        part = KINDS[kind][1]
        model = part.split(".")[0]
        if getattr(self, model) is None:
            raise ValueError(
                f"Features of kind {kind!r} come from the {model}, which this teacher, "
                f"{self.name}, lacks. Load one that has it; the tracker comes with "
                "with_tracker=True."
            )
        return part

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return (self.detector or self.tracker).config.image_size

    def to(self, device: torch.device | str) -> "Teacher":
        """Move to a device, whole."""
        self.device = torch.device(device)
        self.module.to(self.device)
        return self

    def compile(self) -> "Teacher":
        """Compile the trunk with torch.compile; there the time goes."""
        (self.detector or self.tracker).vision_encoder.backbone.compile()
        return self

    def prepare(self, accelerator: Accelerator) -> "Teacher":
        """Bring it to where the training runs.

        It is only moved, whole, to each rank's device, unless the training shards its weights: then
        the teacher's are sharded likewise, though with settings of its own.
        """
        self.device = accelerator.device
        if accelerator.distributed_type == DistributedType.FSDP:
            shard(self.module, accelerator)
        elif accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.module = prepare_deepspeed(self.module, accelerator, self.dtype)
        else:
            self.module.to(accelerator.device)
        return self


# What is computed, as steps.


def trunk_features(models: TeacherModels, pixel_values: Tensor) -> dict[str, Tensor]:
    """The trunk's output, before any neck."""
    trunk: Any = models.detector.vision_encoder.backbone
    outputs = trunk(pixel_values, return_dict=True)
    return {"trunk": outputs.last_hidden_state}


def level_features(models: TeacherModels, pixel_values: Tensor) -> dict[str, Tensor]:
    """The three maps that the concept model's heads read, finest first."""
    return named_levels(models.detector.vision_encoder(pixel_values, return_dict=True))


def tracker_level_features(models: TeacherModels, pixel_values: Tensor) -> dict[str, Tensor]:
    """The three maps of the tracker's own neck, finest first."""
    encoder: Any = models.tracker.vision_encoder
    return named_levels(encoder(pixel_values, return_dict=True))


def frame_features(models: TeacherModels, pixel_values: Tensor) -> dict[str, Tensor]:
    """All that the tracker's heads and memory need of a frame."""
    tracker: Any = models.tracker
    features = tracker.encode_frames(pixel_values)
    maps = {"fine": features.fine, "middle": features.middle, "coarse": features.coarse}
    return {name: to_tokens(each) for name, each in maps.items()}


# Kind of features -> how they are computed, and the part of the teacher that they depend on.
KINDS: dict[str, tuple[Callable[[TeacherModels, Tensor], dict[str, Tensor]], str]] = {
    "trunk": (trunk_features, "detector.vision_encoder.backbone"),
    "levels": (level_features, "detector.vision_encoder"),
    "tracker_levels": (tracker_level_features, "tracker.vision_encoder"),
    "clip": (frame_features, "tracker"),
}


def named_levels(outputs: Any) -> dict[str, Tensor]:
    """Tokens of the maps of a neck that are read."""
    return {
        f"level_{number}": to_tokens(level)
        for number, level in enumerate(outputs.fpn_hidden_states[:3])
    }


def to_tokens(feature_map: Tensor) -> Tensor:
    """A map (images, channels, height, width) as tokens (images, tokens, channels)."""
    return feature_map.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor) -> Tensor:
    """Tokens (images, tokens, channels) of a square as a map (images, channels, side, side).

    >>> to_map(torch.zeros(2, 64, 5)).shape
    torch.Size([2, 5, 8, 8])
    """
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def clip_frames(features: Mapping[str, Tensor], clips: int) -> list[FrameFeatures]:
    """Features of kind "clip" in the form that the tracker takes as `frames`.

    Args:
        features: Of all frames of all clips, those of one clip after another.
        clips: How many clips these are.
    """
    fine, middle, coarse = (to_map(features[name]) for name in ("fine", "middle", "coarse"))
    encoding = Sam3SinePositionEmbedding(coarse.shape[1] // 2, normalize=True)
    # In float32, since bfloat16 cannot count rows; see the vision encoder.
    shape = torch.Size((1, *coarse.shape[1:]))
    positions = to_tokens(encoding(shape, coarse.device, torch.float32)).to(coarse.dtype)
    in_clips = [each.unflatten(0, (clips, -1)).unbind(dim=1) for each in (fine, middle, coarse)]
    return [FrameFeatures(*maps, positions=positions) for maps in zip(*in_clips, strict=True)]


# From whatever SAM 3 there is to our models.


def load_teacher(
    teacher: PreTrainedModel | str | os.PathLike,
    dtype: str | torch.dtype = "bfloat16",
    with_tracker: bool = False,
) -> Teacher:
    """A frozen teacher out of any SAM 3.

    Args:
        teacher: Folder or Hub name of a SAM 3 of transformers (`facebook/sam3`) or of this family;
            or a `Sam3Model`, `Sam3VideoModel`, `Sam3TrackerVideoModel`, `EfficientSam3Model`,
            `EfficientSam3TrackerVideoModel` or `EfficientSam3VideoModel`, which is copied.
        dtype: Precision to compute in: float32, bfloat16 or float16.
        with_tracker: Whether to load the tracker in video, too.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}.")
        dtype = DTYPES[dtype]
    is_model = isinstance(teacher, PreTrainedModel)
    name = type(teacher).__name__ if is_model else os.fspath(teacher)
    with loading_whole():
        if not is_model and AutoConfig.from_pretrained(name).model_type == "efficientsam3":
            return Teacher(*from_family(name, with_tracker), dtype, name)
        whole: Any = teacher if is_model else AutoModel.from_pretrained(name)
        detector, tracker = copies(whole, with_tracker)
    if with_tracker and tracker is None:
        raise ValueError(
            f"The teacher, a {type(whole).__name__}, has no tracker in video. Give a "
            "Sam3VideoModel, or a folder of SAM 3, which has both."
        )
    return Teacher(detector, tracker, dtype, name)


def from_family(
    folder: str | os.PathLike, with_tracker: bool
) -> tuple[EfficientSam3Model, EfficientSam3TrackerVideoModel | None]:
    """Concept model and tracker of a folder of our family."""
    detector = EfficientSam3Model.from_pretrained(folder)
    if not with_tracker:
        return detector, None
    return detector, EfficientSam3TrackerVideoModel.from_pretrained(folder)


def copies(
    teacher: PreTrainedModel, with_tracker: bool
) -> tuple[EfficientSam3Model | None, EfficientSam3TrackerVideoModel | None]:
    """Concept model and tracker of our family with the weights of a model."""
    if isinstance(teacher, EfficientSam3Model):
        return copy.deepcopy(teacher), None
    if isinstance(teacher, EfficientSam3TrackerVideoModel):
        return None, copy.deepcopy(teacher)
    config = teacher.config
    if isinstance(teacher, EfficientSam3VideoModel):
        detector_config, tracker_config = config.detector_config, config.tracker_config
    elif config.model_type == "sam3_video":
        detector_config = concept_config(config.detector_config)
        tracker_config = video_config(config.tracker_config)
    elif config.model_type == "sam3":
        detector_config, tracker_config = concept_config(config), None
    elif config.model_type == "sam3_tracker_video":
        detector_config, tracker_config = None, video_config(config)
    else:
        raise TypeError(
            f"A teacher is a SAM 3 with a detector, a tracker in video or both, not a "
            f"{type(teacher).__name__}."
        )
    detector = tracker = None
    if detector_config is not None:
        detector = EfficientSam3Model.from_teacher(teacher, copy.deepcopy(detector_config))
    if tracker_config is not None and (with_tracker or detector is None):
        tracker_config = copy.deepcopy(tracker_config)
        tracker = EfficientSam3TrackerVideoModel.from_teacher(teacher, tracker_config)
    for model in (detector, tracker):
        if model is not None and model.fresh_parts:
            raise ValueError(
                f"A {type(teacher).__name__} says nothing of {', '.join(model.fresh_parts)} of the "
                "teacher, which must not start at random."
            )
    return detector, tracker


def concept_config(config: PreTrainedConfig) -> EfficientSam3Config:
    """Our configuration of a `Sam3Model`, which has no weights for exemplar points."""
    fields = same_fields(config, EfficientSam3Config)
    return EfficientSam3Config(**fields, has_point_branch=False)


def video_config(config: PreTrainedConfig) -> EfficientSam3TrackerVideoConfig:
    """Our configuration of a `Sam3TrackerVideoModel`."""
    fields = same_fields(config, EfficientSam3TrackerVideoConfig)
    return EfficientSam3TrackerVideoConfig(**fields, memory="dense")


def same_fields(config: PreTrainedConfig, target: Any) -> dict[str, Any]:
    """The values of those fields that a class of configurations has of its own, too."""
    common = set(PreTrainedConfig.__dataclass_fields__)
    names = set(target.__dataclass_fields__) - common
    return {name: value for name, value in config.to_dict().items() if name in names}


@contextmanager
def loading_whole() -> Iterator[None]:
    """Load weights on every rank and in full, though the student's may be sharded while loading.

    Under ZeRO-3, transformers partitions what it loads; under FSDP with efficient loading, only the
    first rank reads weights. A teacher is sharded later, and by itself.
    """
    variable = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    efficient = os.environ.pop(variable, None)
    reference = deepspeed_integration._hf_deepspeed_config_weak_ref
    deepspeed_integration._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = reference
        if efficient is not None:
            os.environ[variable] = efficient


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast all that a checkpoint holds; what is computed at construction keeps its precision.

    `Module.to` would round the frequencies of rotary positions, too, by up to a tenth of a radian
    at the far side of the ViT's grid.
    """
    for each in module.modules():
        for name, buffer in each.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in each._non_persistent_buffers_set:
                setattr(each, name, buffer.to(dtype))
        for parameter in each.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)


def weight_hashes(module: nn.Module) -> dict[str, str]:
    """Hash of each weight, by name, as bfloat16 has it."""
    hashes = {}
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16).view(torch.int16)
        digest = hashlib.sha256(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
        hashes[name] = digest.hexdigest()[:32]
    return hashes


def own_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration, and those inside it, say of the model, and not of how it is used."""
    fields = type(config).__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
    values = {name: getattr(config, name) for name in fields}
    return {
        name: own_settings(value) if isinstance(value, PreTrainedConfig) else value
        for name, value in values.items()
    }


# Over many devices.


def shard(module: nn.Module, accelerator: Accelerator) -> None:
    """Shard over all ranks, layer by layer, whatever the wrapping policy of the student is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for each in module.modules():
        if isinstance(each, LARGE_LAYERS):
            fully_shard(each, mesh=mesh)
    fully_shard(module, mesh=mesh)
    module.to(accelerator.device)  # buffers, which nobody shards


def prepare_deepspeed(module: nn.Module, accelerator: Accelerator, dtype: torch.dtype) -> nn.Module:
    """Under ZeRO-3 an engine of its own, which shards the weights; otherwise only moved."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    if zero.get("stage") != 3:
        return module.to(accelerator.device)
    try:
        import deepspeed  # pyright: ignore[reportMissingImports]  installed by who launches it
    except ImportError as error:
        raise ImportError("ZeRO-3 needs DeepSpeed: pip install deepspeed.") from error
    own_config = {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and of no effect without an optimiser
        "zero_optimization": {
            name: value
            for name, value in zero.items()
            if name == "stage" or name.startswith(("offload_param", "stage3_"))
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    engine, *_ = deepspeed.initialize(model=module, config=own_config)
    engine.eval()  # which, of an engine, gives nothing
    return engine
