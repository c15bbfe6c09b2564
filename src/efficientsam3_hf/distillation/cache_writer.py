"""Writing a teacher's features: planned, shard by shard, resumable, shared by ranks.

writer = CacheWriter("cache", samples, processor, teacher, CacheOptions(codec="int8"))
print(writer.plan())
writer.write()

A shard holds the features of some consecutive samples, whichever rank computes it. So what is on
disk does not depend on how many ranks there were, or on how often the writing was interrupted.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data.loading import Samples
from .arguments import option
from .cache_files import (
    CODEC,
    INDEX,
    MANIFEST,
    CacheError,
    Manifest,
    alone_in,
    checksum,
    picture_keys,
    refuse_differences,
    shard_path,
    thumbnails,
    transform_settings,
    write_json,
    write_whole,
)
from .codecs import Codec, CodecError, HalfCodec, Int8Codec, PcaFit, bytes_of, check_name
from .codecs import codec_tensors as tensors_of
from .in_batches import in_batches
from .teacher import Teacher
from .teacher_cache import TeacherCache, dataset_settings, load_codecs

GO_ON = "Give what it was made with to go on, or another folder."


@dataclass
class CacheOptions:
    """How features are cached."""

    kind: str = option(
        "trunk",
        "Of the features: trunk (the trunk's output), levels or tracker_levels (the maps of the "
        "concept model's or the tracker's neck), or clip (what the tracker needs of each frame).",
    )
    codec: str = option("int8", "fp16, int8 or pca.")
    rank: int | None = option(None, "Components of pca; None for as many as hold `energy`.")
    energy: float = option(0.99, "Share of the variance that pca keeps.")
    fit_samples: int = option(256, "Samples, from all over, that the basis of pca is fitted on.")
    flips: bool = option(False, "Cache each picture flipped left to right, too.")
    batch_size: int = option(8, "Samples that go through the teacher at a time.")
    num_workers: int = option(4, "Processes that read samples.")
    shard_megabytes: float = option(256.0, "Size of a shard, about; it holds at least one sample.")


@dataclass
class CachePlan:
    """What writing a cache will take.

    Args:
        samples: Of the dataset.
        pictures: What is stored of them, flips included.
        bytes_per_picture: Of features and the little that is stored beside them.
        shards: All of them.
        shards_to_write: Those that are not there yet.
        bytes_to_write: Of these.
        seconds: For these, as long as pictures are read as fast as the teacher computes.
        free_bytes: Where the cache lies.
    """

    samples: int
    pictures: int
    bytes_per_picture: int
    shards: int
    shards_to_write: int
    bytes_to_write: int
    seconds: float
    free_bytes: int

    def __str__(self) -> str:
        hours, minutes = divmod(round(self.seconds / 60), 60)
        return (
            f"{self.pictures:,} pictures of {self.samples:,} samples, {self.bytes_per_picture:,} "
            f"bytes each. To write: {self.shards_to_write} of {self.shards} shards, "
            f"{self.bytes_to_write / 1e9:,.2f} GB ({self.free_bytes / 1e9:,.2f} GB are free), in "
            f"about {hours} h {minutes:02d} min."
        )


@dataclass
class Shard:
    """A shard that is being filled.

    Args:
        number: Of the shard.
        tensors: Of each name, what was stored of each batch.
        pictures: Names of the pictures, in their order.
        errors: Of each part.
        skipped: Samples that could not be read.
    """

    number: int
    tensors: dict[str, list[Tensor]] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    errors: dict[str, CodecError] = field(default_factory=dict)
    skipped: int = 0


class CacheCollator:
    """Names and pixels of samples, and how many could not be read."""

    def __init__(self, image_processor: Any):
        self.image_processor = image_processor

    def __call__(self, samples: Sequence[Any]) -> tuple[list[str], Tensor | None, int]:
        usable = [sample for sample in samples if sample is not None]
        keys = [key for sample in usable for key in picture_keys(sample)]
        pictures = [picture for sample in usable for picture in pictures_of(sample)]
        pixels = None
        if pictures:
            pixels = self.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return keys, pixels, len(samples) - len(usable)


class CacheWriter:
    """Writes a cache, or what is missing of it.

    Args:
        folder: Of the cache.
        samples: What `load(reader)` gave. Of videos, cuts that start at the same place in each
            epoch.
        processor: Processor or image processor, whose transform the student will have, too.
        teacher: Whose features to cache; whole on each rank, not prepared for sharding.
        options: How.
        state: Ranks and their device; None for accelerate's.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        samples: Samples,
        processor: Any,
        teacher: Teacher,
        options: CacheOptions,
        state: PartialState | None = None,
    ):
        check_name(options.codec)
        if not isinstance(samples, Samples):
            raise TypeError(
                "A cache is written of samples by number, whose order and number are known: "
                f"load(reader), not a {type(samples).__name__}."
            )
        self.folder, self.samples, self.teacher, self.options = (
            Path(folder), samples, teacher, options,
        )  # fmt: skip
        self.image_processor = getattr(processor, "image_processor", processor)
        # accelerate joins ranks without an accelerator only if it is told that there is none.
        self.state = state or PartialState(cpu=teacher.device.type == "cpu")
        self.seconds_per_batch = 0.0
        with self.alone():
            if self.state.is_main_process:
                self.manifest = self.begin()
            self.state.wait_for_everyone()
            if not self.state.is_main_process:
                self.manifest = self.load_manifest()
        self.codecs = load_codecs(self.folder, self.manifest)

    # What is to be written.

    def identity(self) -> dict[str, Any]:
        """What makes this cache another than others."""
        options = self.options
        codec: dict[str, Any] = {"name": options.codec}
        if options.codec == "pca":
            energy = options.energy if options.rank is None else None
            codec |= {"rank": options.rank, "energy": energy, "fit_samples": options.fit_samples}
        return {
            "kind": options.kind,
            "codec": codec,
            "flips": options.flips,
            "teacher": {
                "fingerprint": self.teacher.fingerprint(options.kind),
                "dtype": str(self.teacher.dtype).removeprefix("torch."),
                "image_size": self.teacher.image_size,
            },
            "transform": transform_settings(self.image_processor),
            "dataset": dataset_settings(self.samples),
        }

    def load_manifest(self) -> Manifest:
        """That of the folder, if it is of what is to be written."""
        manifest = Manifest.load(self.folder)
        refuse_differences(self.folder, manifest, self.identity(), GO_ON)
        return manifest

    def begin(self) -> Manifest:
        """The manifest of the folder, or a new one, with the codec fitted."""
        if (self.folder / MANIFEST).is_file():
            return self.load_manifest()
        left = {".lock", CODEC, f"{CODEC}.part", f"{MANIFEST}.part"}
        strange = [path.name for path in self.folder.iterdir() if path.name not in left]
        if strange:
            raise CacheError(
                f"{self.folder} is not empty ({sorted(strange)[0]}) and holds no teacher cache. "
                "Choose another folder."
            )
        names = self.samples.names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise CacheError(f"The samples have a name twice, {twice}: a cache finds them by name.")
        features, pictures_per_sample = self.first_features()
        codecs = self.fit(features)
        bytes_per_picture = sum(
            bytes_of(codecs[part].encode(tokens[:1]).values()) for part, tokens in features.items()
        )
        per_sample = bytes_per_picture * pictures_per_sample * (2 if self.options.flips else 1)
        checksum_of_codec = None
        tensors = {
            f"{part}.{name}": tensor
            for part, codec in codecs.items()
            for name, tensor in tensors_of(codec).items()
        }
        if tensors:
            write_whole(self.folder / CODEC, save(tensors))
            checksum_of_codec = checksum(self.folder / CODEC)
        manifest = Manifest(
            **self.identity(),
            parts={part: list(tokens.shape[1:]) for part, tokens in features.items()},
            samples_per_shard=max(1, int(self.options.shard_megabytes * 1_000_000 / per_sample)),
            versions={
                "efficientsam3-hf": version("efficientsam3-hf"),
                "transformers": transformers.__version__,
                "torch": torch.__version__,
            },
            teacher_name=self.teacher.name,
            codec_checksum=checksum_of_codec,
        )
        manifest.save(self.folder)
        return manifest

    def first_features(self) -> tuple[dict[str, Tensor], int]:
        """Features of the first sample that can be read, and how many pictures it has."""
        for index in range(len(self.samples)):
            _, pixels, _ = CacheCollator(self.image_processor)([self.samples[index]])
            if pixels is not None:
                return self.teacher.features(self.options.kind, pixels), len(pixels)
        raise CacheError(f"None of the {len(self.samples)} samples could be read.")

    def fit(self, features: dict[str, Tensor]) -> dict[str, Codec]:
        """The codec of each part; one with a basis is fitted on samples from all over."""
        if self.options.codec != "pca":
            codec = HalfCodec() if self.options.codec == "fp16" else Int8Codec()
            return dict.fromkeys(features, codec)
        count = min(self.options.fit_samples, len(self.samples))
        chosen = [index * len(self.samples) // count for index in range(count)]
        fits = {part: PcaFit(tokens.shape[-1]) for part, tokens in features.items()}
        batches = list(in_batches(chosen, self.options.batch_size))
        loader = self.loader(batches)
        for _, pixels, _ in tqdm(loader, "fitting", disable=not self.state.is_main_process):
            if pixels is None:
                continue
            for part, tokens in self.teacher.features(self.options.kind, pixels).items():
                fits[part].add(tokens)
        return {
            part: fit.codec(self.options.rank, self.options.energy) for part, fit in fits.items()
        }

    def plan(self) -> CachePlan:
        """What there is to do; the teacher is timed on one batch."""
        features, pictures_per_sample = self.first_features()
        flips = 2 if self.options.flips else 1
        bytes_per_picture = sum(
            bytes_of(self.codecs[part].encode(tokens[:1]).values())
            for part, tokens in features.items()
        )
        bytes_per_picture += 2 * thumbnails(torch.zeros(1, 3, 32, 32)).numel()
        missing = self.missing()
        starts = [number * self.manifest.samples_per_shard for number in missing]
        samples = sum(
            min(self.manifest.samples_per_shard, len(self.samples) - start) for start in starts
        )
        size = self.teacher.image_size
        batch = torch.zeros(self.options.batch_size * pictures_per_sample, 3, size, size)
        seconds = 0.0
        for _ in range(2):  # the first one warms up, or compiles
            start = time.perf_counter()
            for part, tokens in self.teacher.features(self.options.kind, batch).items():
                for stored in self.codecs[part].encode(tokens).values():
                    stored.cpu()
            seconds = time.perf_counter() - start
        pictures_to_write = samples * pictures_per_sample * flips
        return CachePlan(
            samples=len(self.samples),
            pictures=len(self.samples) * pictures_per_sample * flips,
            bytes_per_picture=bytes_per_picture,
            shards=self.manifest.num_shards,
            shards_to_write=len(missing),
            bytes_to_write=pictures_to_write * bytes_per_picture,
            seconds=seconds / len(batch) * pictures_to_write / self.state.num_processes,
            free_bytes=shutil.disk_usage(self.folder).free,
        )

    # Writing.

    def write(self) -> TeacherCache:
        """Write what is missing, and open the cache."""
        with self.alone():
            missing = self.missing()
            if missing:
                if self.state.is_main_process:
                    (self.folder / INDEX).unlink(missing_ok=True)
                self.state.wait_for_everyone()
                own = missing[self.state.process_index :: self.state.num_processes]
                self.write_shards(own)
            self.state.wait_for_everyone()
            if self.state.is_main_process and not (self.folder / INDEX).is_file():
                self.finish()
            self.state.wait_for_everyone()
        return TeacherCache.open(self.folder, self.teacher, self.image_processor, self.samples)

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there, or not whole."""
        return [number for number in range(self.manifest.num_shards) if not self.is_done(number)]

    def is_done(self, number: int) -> bool:
        """Whether a shard is there; what is said of it is written last."""
        path, record = shard_path(self.folder, number), self.record_of(number)
        return record is not None and path.is_file() and path.stat().st_size == record["bytes"]

    def record_of(self, number: int) -> dict[str, Any] | None:
        """What is said of a shard; None if it is not there."""
        path = shard_path(self.folder, number, ".json")
        return json.loads(path.read_text()) if path.is_file() else None

    def write_shards(self, numbers: Sequence[int]) -> None:
        """Compute and write some shards; one is written while the next is computed."""
        batches: list[list[int]] = []
        ends: dict[int, int] = {}  # number of the batch that is the last of a shard -> the shard
        for number in numbers:
            start = number * self.manifest.samples_per_shard
            stop = min(start + self.manifest.samples_per_shard, len(self.samples))
            batches += in_batches(range(start, stop), self.options.batch_size)
            ends[len(batches) - 1] = number
        total = sum(map(len, batches))
        written: Future | None = None
        with (
            ThreadPoolExecutor(max_workers=1) as background,
            tqdm(
                total=total, desc="caching", unit="sample", disable=not self.state.is_main_process
            ) as progress,
        ):
            shard = Shard(-1)
            for index, (keys, pixels, skipped) in enumerate(self.loader(batches)):
                shard.skipped += skipped
                if pixels is not None:
                    self.add(shard, keys, pixels)
                progress.update(len(batches[index]))
                if index in ends:
                    shard.number = ends[index]
                    if written is not None:
                        written.result()
                    written = background.submit(self.write_shard, shard)
                    shard = Shard(-1)
            if written is not None:
                written.result()

    def add(self, shard: Shard, keys: list[str], pixels: Tensor) -> None:
        """Put the features of some pictures, and of the flipped ones, into a shard."""
        for seen in (pixels, pixels.flip(-1)) if self.options.flips else (pixels,):
            shard.pictures += keys
            shard.tensors.setdefault("thumbnails", []).append(thumbnails(seen))
            for part, tokens in self.teacher.features(self.options.kind, seen).items():
                finite = tokens.isfinite().flatten(1).all(dim=1)
                if not finite.all():
                    strange = keys[int((~finite).nonzero()[0])]
                    raise ValueError(
                        f"The teacher's features of {strange} are not finite in "
                        f"{self.teacher.dtype}. Load it in another dtype, or leave that sample out."
                    )
                codec = self.codecs[part]
                stored = codec.encode(tokens)
                error = CodecError.between(codec.decode(stored), tokens)
                shard.errors[part] = shard.errors.get(part, CodecError()) + error
                for name, tensor in stored.items():
                    shard.tensors.setdefault(f"{part}.{name}", []).append(tensor.cpu())

    def write_shard(self, shard: Shard) -> None:
        """Write a shard, then what is said of it."""
        tensors = {name: torch.cat(parts) for name, parts in shard.tensors.items()}
        path = shard_path(self.folder, shard.number)
        data = save(tensors)
        write_whole(path, data)
        record = {
            "number": shard.number,
            "bytes": len(data),
            "checksum": hashlib.sha256(data).hexdigest(),
            "skipped": shard.skipped,
            "pictures": shard.pictures,
            "errors": {part: asdict(error) for part, error in shard.errors.items()},
        }
        write_json(shard_path(self.folder, shard.number, ".json"), record)

    def finish(self) -> None:
        """Gather what is said of the shards."""
        records = [self.record_of(number) for number in range(self.manifest.num_shards)]
        shards: list[dict[str, Any]] = []
        errors: dict[str, CodecError] = {}
        for record in records:
            assert record is not None  # all ranks have written their share
            for part, sums in record.pop("errors").items():
                errors[part] = errors.get(part, CodecError()) + CodecError(**sums)
            shards.append(record)
        summary = {part: error.summary() for part, error in errors.items()}
        write_json(self.folder / INDEX, {"errors": summary, "shards": shards})

    def loader(self, batches: list[list[int]]) -> Iterable[tuple[list[str], Tensor | None, int]]:
        """Names, pixels and number of unread samples, of each batch."""
        return DataLoader(
            self.samples,  # pyright: ignore[reportArgumentType]  its __getitem__ may give None
            batch_sampler=batches,
            num_workers=min(self.options.num_workers, len(batches)),
            collate_fn=CacheCollator(self.image_processor),
        )

    def alone(self) -> AbstractContextManager[None]:
        """Keep other runs out of the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.state.is_main_process:
            return nullcontext()
        refusal = f"Another process is writing the cache in {self.folder}. Wait for it, or stop it."
        return alone_in(self.folder, CacheError(refusal))


def pictures_of(sample: Any) -> list[Any]:
    """The picture of a sample, or the frames of a cut."""
    pictures = sample.frames if hasattr(sample, "frames") else [sample.image]
    if pictures is None or pictures[0] is None:
        raise ValueError(f"{sample.source_id} was read without pixels.")
    return pictures
