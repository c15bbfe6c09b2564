"""How features are stored: in half precision, in bytes, or as few components in bytes.

A codec takes tokens (images, tokens, channels) and gives tensors whose first dimension is images.
What is stored of an image has the same size for all, and depends on no other.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Stored = dict[str, Tensor]

CODECS = ("fp16", "int8", "pca")
LARGEST_HALF = torch.finfo(torch.float16).max


class Codec(Protocol):
    """What a cache needs of a way to store features."""

    def encode(self, features: Tensor) -> Stored:
        """What to store of tokens (images, tokens, channels)."""
        ...

    def decode(self, stored: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Tokens (images, tokens, channels), on the device of what was stored."""
        ...


@dataclass(frozen=True)
class HalfCodec:
    """float16: off by 2^-11 of a value at most, or by 2^-25 where that is more."""

    def encode(self, features: Tensor) -> Stored:
        largest = features.abs().max()
        if largest > LARGEST_HALF:
            raise ValueError(
                f"Features of up to {largest:.3g} do not fit float16, which ends at "
                f"{LARGEST_HALF:.0f}. Take the codec int8, which scales each channel."
            )
        return {"values": features.to(torch.float16)}

    def decode(self, stored: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        return stored["values"].to(dtype)


@dataclass(frozen=True)
class Int8Codec:
    """One byte a value, with a scale for each image and channel: off by half a step at most.

    A step is the channel's largest absolute value in that image, divided by 127.
    """

    def encode(self, features: Tensor) -> Stored:
        features = features.float()
        scales = features.abs().amax(dim=1) / 127  # (images, channels)
        steps = torch.where(scales > 0, scales, 1.0)
        values = (features / steps[:, None]).round().clamp(-127, 127)
        return {"values": values.to(torch.int8), "scales": scales}

    def decode(self, stored: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        return (stored["values"] * stored["scales"][:, None]).to(dtype)


@dataclass(frozen=True, eq=False)
class PcaCodec:
    """The first principal components of the tokens, one byte each.

    Args:
        mean: (channels,).
        basis: (channels, rank), orthonormal columns, the strongest first.
        energy: Share of the variance that the basis holds, in the images it was fitted on.
    """

    mean: Tensor
    basis: Tensor
    energy: float

    def encode(self, features: Tensor) -> Stored:
        mean, basis = self.mean.to(features.device), self.basis.to(features.device)
        return Int8Codec().encode((features.float() - mean) @ basis)

    def decode(self, stored: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        components = Int8Codec().decode(stored, dtype)
        device = components.device
        mean, basis = self.mean.to(device, dtype), self.basis.to(device, dtype)
        return torch.addmm(mean, components.flatten(0, 1), basis.T).unflatten(
            0, components.shape[:2]
        )


class PcaFit:
    """Principal components of tokens that come batch by batch."""

    def __init__(self, channels: int):
        self.count = 0
        self.sum = torch.zeros(channels, dtype=torch.float64)
        self.products = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take in tokens (images, tokens, channels)."""
        for tokens in features.float():  # an image at a time, as float64 takes much room
            tokens = tokens.cpu().double()
            self.count += len(tokens)
            self.sum += tokens.sum(dim=0)
            self.products += tokens.T @ tokens

    def codec(self, rank: int | None = None, energy: float | None = None) -> PcaCodec:
        """The codec of so many components, or of as many as hold a share of the variance."""
        mean = self.sum / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        variances, vectors = torch.linalg.eigh(covariance)
        variances, vectors = variances.flip(0).clamp(min=0), vectors.flip(1)
        channels = len(mean)
        shares = variances.cumsum(0) / variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
        if rank is None:
            rank = int((shares < (1.0 if energy is None else energy)).sum()) + 1
            rank = min(rank, channels)
        if not 1 <= rank <= channels:
            raise ValueError(f"Features of {channels} channels have no {rank} components.")
        # A vector's sign is anybody's choice; with this one, the same weights give the same bytes.
        basis = vectors[:, :rank]
        largest = basis.abs().argmax(dim=0)
        signs = basis[largest, torch.arange(rank)].sign()
        return PcaCodec(mean.float(), (basis * signs).float().contiguous(), float(shares[rank - 1]))


@dataclass
class CodecError:
    """How far decoded features are from what was encoded; sums, so that errors add up.

    Args:
        squared_error: Sum of squared differences.
        squared: Sum of squared features.
        cosine: Sum of the cosines of all tokens.
        tokens: How many these are.
    """

    squared_error: float = 0.0
    squared: float = 0.0
    cosine: float = 0.0
    tokens: int = 0

    @classmethod
    def between(cls, decoded: Tensor, features: Tensor) -> "CodecError":
        """That of tokens (images, tokens, channels)."""
        decoded, features = decoded.float(), features.float()
        cosines = torch.cosine_similarity(decoded, features, dim=-1)
        return cls(
            squared_error=(decoded - features).square().sum().item(),
            squared=features.square().sum().item(),
            cosine=cosines.sum().item(),
            tokens=cosines.numel(),
        )

    def __add__(self, other: "CodecError") -> "CodecError":
        return CodecError(
            self.squared_error + other.squared_error,
            self.squared + other.squared,
            self.cosine + other.cosine,
            self.tokens + other.tokens,
        )

    def summary(self) -> dict[str, float]:
        """Norm of the error as a share of the features' norm, and mean cosine of tokens."""
        return {
            "relative_error": math.sqrt(self.squared_error / self.squared) if self.squared else 0.0,
            "cosine": self.cosine / max(self.tokens, 1),
        }


def bytes_of(stored: Iterable[Tensor]) -> int:
    """Bytes of what is stored of one image."""
    return sum(each[0].numel() * each.element_size() for each in stored)


def load_codec(name: str, tensors: Mapping[str, Tensor]) -> Codec:
    """A codec out of its name and, where it was fitted, its tensors."""
    if name == "pca":
        return PcaCodec(tensors["mean"], tensors["basis"], float(tensors["energy"]))
    check_name(name)
    return HalfCodec() if name == "fp16" else Int8Codec()


def codec_tensors(codec: Any) -> Stored:
    """What a codec needs to be kept of it."""
    if not isinstance(codec, PcaCodec):
        return {}
    energy = torch.tensor(codec.energy, dtype=torch.float64)
    return {"mean": codec.mean, "basis": codec.basis, "energy": energy}


def check_name(name: str) -> None:
    """Raise for what is no codec."""
    if name not in CODECS:
        raise ValueError(f"There is no codec {name!r}; codecs are {', '.join(CODECS)}.")
