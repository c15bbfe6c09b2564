"""The nine convolutional trunks, out of timm, repaired for faithful outputs and exports.

A trunk maps an image to four feature maps of stride 4, 8, 16 and 32. Its weights carry timm's
names, so that timm's ImageNet checkpoints load into it.
"""

from collections.abc import Sequence

import timm
import torch
from timm.models import efficientvit_mit, repvit, tiny_vit
from torch import Tensor, nn
from transformers import initialization as init

# timm name -> channels of the maps of stride 4, 8, 16 and 32.
TRUNK_CHANNELS = {
    "efficientvit_b0": (16, 32, 64, 128),
    "efficientvit_b1": (32, 64, 128, 256),
    "efficientvit_b2": (48, 96, 192, 384),
    "repvit_m0_9": (48, 96, 192, 384),
    "repvit_m1_1": (64, 128, 256, 512),
    "repvit_m2_3": (80, 160, 320, 640),
    "tiny_vit_5m_224": (64, 128, 160, 320),
    "tiny_vit_11m_224": (64, 128, 256, 448),
    "tiny_vit_21m_224": (96, 192, 384, 576),
}

# Of SAM 3's students; timm's default of 1e-5 moves the outputs of EfficientViT-B1 by 0.05.
LITE_MLA_EPS = 1e-15


class GuardedLiteMLA(efficientvit_mit.LiteMLA):
    """EfficientViT attention that divides by no less than epsilon, also after an export.

    timm adds epsilon, which is the same to rounding. But ONNX's optimizer takes the addition of
    1e-15 for one of zero and drops it, and where no key meets a query, 0 / 0 is left.
    """

    def _attn(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.float() @ (k.float().transpose(-1, -2) @ v.float())
        return (out[..., :-1] / out[..., -1:].clamp(min=self.eps)).to(v.dtype)


class PlainAttention(tiny_vit.Attention):
    """TinyViT attention that reads its bias table anew in every forward.

    timm keeps the gathered table in evaluation mode. The copy goes stale when weights are loaded
    into a model that is already in evaluation mode, and carries a freed graph into the second
    backward of one that trains with frozen statistics. The gather costs microseconds.
    """

    def get_attention_biases(self, device: torch.device) -> Tensor:
        return self.attention_biases[:, self.attention_bias_idxs]


def build_trunk(name: str, drop_path_rate: float = 0.0, pretrained: bool = False) -> nn.Module:
    """A timm model without its classifier.

    Args:
        name: One of `TRUNK_CHANNELS`.
        drop_path_rate: Share of residual branches dropped in training; only TinyViT has them.
        pretrained: Fetch timm's ImageNet weights from the Hub.
    """
    if name not in TRUNK_CHANNELS:
        raise ValueError(f"Unknown trunk {name!r}; choose one of {', '.join(TRUNK_CHANNELS)}.")
    options = {"drop_path_rate": drop_path_rate} if name.startswith("tiny_vit") else {}
    trunk = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    # timm leaves a norm or pooling there, whose weights nothing would use.
    trunk.head = nn.Identity()
    for module in trunk.modules():
        if isinstance(module, efficientvit_mit.LiteMLA):
            module.__class__ = GuardedLiteMLA
            module.eps = LITE_MLA_EPS
        elif isinstance(module, tiny_vit.Attention):
            module.__class__ = PlainAttention
        elif isinstance(module, repvit.RepVitMlp):
            module.conv2.bn.starts_at_zero = True
        elif isinstance(module, tiny_vit.MBConv):
            module.conv3.bn.starts_at_zero = True
    return trunk


def trunk_features(trunk: nn.Module, pixel_values: Tensor, stages: Sequence[int]) -> list[Tensor]:
    """Feature maps (batch, channels, height, width) of the given stages, 0 being stride 4."""
    return trunk.forward_intermediates(
        pixel_values, indices=list(stages), intermediates_only=True, stop_early=True
    )


def use_fused_attention(trunk: nn.Module, fused: bool) -> None:
    """Choose between `scaled_dot_product_attention` and explicit products in TinyViT."""
    for module in trunk.modules():
        if isinstance(module, tiny_vit.Attention):
            module.fused_attn = fused


@torch.no_grad()
def fuse_trunk(trunk: nn.Module) -> None:
    """Fold RepViT's parallel branches and batch norms into single convolutions, in place.

    Folding is done in double precision, so that the only error left is the rounding of the folded
    weights.
    """
    if not isinstance(trunk, repvit.RepVit):
        raise ValueError(f"Only RepViT trunks can be fused; this is a {type(trunk).__name__}.")
    if not can_fuse(trunk):
        raise ValueError("This RepViT trunk is fused already.")
    dtype = next(trunk.parameters()).dtype
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # timm creates the folded convolutions in it
    try:
        trunk.double()
        _fuse_children(trunk)
    finally:
        torch.set_default_dtype(default_dtype)
    trunk.to(dtype)


def can_fuse(trunk: nn.Module) -> bool:
    """Whether the trunk still holds branches that `fuse_trunk` can fold."""
    return any(hasattr(module, "fuse") for module in trunk.modules() if module is not trunk)


def _fuse_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        if hasattr(child, "fuse"):
            setattr(module, name, child.fuse())
        else:
            _fuse_children(child)


def init_trunk_module(module: nn.Module) -> None:
    """Initialise one module of a trunk as timm does, for weights that no checkpoint holds.

    Goes through transformers' guarded initialisers, which leave alone what has been loaded.
    """
    if isinstance(module, nn.Conv2d):
        module.reset_parameters()
    elif getattr(module, "starts_at_zero", False):
        init.zeros_(module.weight)  # so that a residual branch begins as the identity
    elif isinstance(module, tiny_vit.Attention):
        init.zeros_(module.attention_biases)
        module.init_non_persistent_buffers()  # index table: in no checkpoint, always made anew
