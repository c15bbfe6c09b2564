"""Records of a dataset in an order: shuffled, split over processes, cut to a subset, resumed.

    data = load(CocoImages("/data/coco", "val2017"))          # by number
    data[0].queries[0].phrase

    data = load(Sa1b("hf://datasets/me/sa-1b"), streaming=True).shuffle(seed=1).split(rank, 8)
    for sample in data: ...

Readers know formats (`coco.py`, `sa1b.py`, ...); order and resumption are Hugging Face datasets':
`pip install "efficientsam3-hf[train]"`. What passes through it are records without pixels; these
are decoded when a sample is asked for.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from copy import copy
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils import data as torch_data

from .broken import DAMAGE, BrokenRecords

Sample = TypeVar("Sample")

Record = dict[str, Any]


class Reader(Generic[Sample]):
    """One format: what records there are, and what each of them says.

    A reader also has `shards` if its files can be read from beginning to end, and
    `records_of_shard` for what is in one of them.
    """

    def records(self) -> Iterator[tuple[str, Record]]:
        """Name and content of each record, in the order of the files; content is as JSON's."""
        raise NotImplementedError

    def read(self, record: Record) -> Sample:
        """The sample that a record describes."""
        raise NotImplementedError

    def shards(self) -> list[str]:
        """Files that can be streamed; none, where records lie in an index."""
        return []

    def records_of_shard(self, shard: str) -> Iterator[tuple[str, Record]]:
        """Name and content of each record of one file."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Choose what a reader chooses anew in each epoch, such as cuts of videos."""


class Choice:
    """Which records belong to a subset: by name, so that order and form of storage do not matter.

    Args:
        fraction: Share of all records, chosen by a hash of seed and name. Smaller shares with the
            same seed are parts of larger ones.
        seed: Another one chooses others.
        names: Of the records, instead.
    """

    def __init__(
        self, fraction: float | None = None, seed: int = 0, names: Collection[str] | None = None
    ):
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(f"fraction is more than 0 and at most 1, not {fraction}.")
        self.fraction, self.seed = fraction, seed
        self.names = None if names is None else frozenset(str(name) for name in names)

    def __contains__(self, name: str) -> bool:
        if self.names is not None and name not in self.names:
            return False
        if self.fraction is None or self.fraction == 1:
            return True
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.fraction * 2**64


class Samples(torch_data.Dataset, Generic[Sample]):
    """Samples by number. One that cannot be used is None, which the collators leave out.

    Iterating gives only those that can be used.

    Args:
        reader: Of the format.
        table: `datasets.Dataset` of the records.
        broken: Where to note what cannot be used.
    """

    def __init__(self, reader: Reader[Sample], table: Any, broken: BrokenRecords):
        self.reader, self.table, self.broken = reader, table, broken

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample | None:
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no record {index} among {len(self)}.")
        return read_row(self.reader, self.table[int(index)], self.broken)

    def __iter__(self) -> Iterator[Sample]:
        for row in self.table:
            sample = read_row(self.reader, row, self.broken)
            if sample is not None:
                yield sample

    def set_epoch(self, epoch: int) -> None:
        """Choose what the reader chooses anew in each epoch."""
        self.reader.set_epoch(epoch)

    @property
    def names(self) -> list[str]:
        """Of all records."""
        return list(self.table["id"])

    def select(self, indices: Collection[int]) -> "Samples[Sample]":
        """Those with these numbers, in this order."""
        return Samples(self.reader, self.table.select(list(indices)), self.broken)

    def shuffle(self, seed: int) -> "Samples[Sample]":
        """In another order."""
        return Samples(self.reader, self.table.shuffle(seed=seed), self.broken)

    def split(self, rank: int, world_size: int) -> "Samples[Sample]":
        """The part of one of several processes; together they have every record once."""
        part = self.table.shard(num_shards=world_size, index=rank, contiguous=False)
        return Samples(self.reader, part, self.broken)

    def stream(self, num_shards: int = 64) -> "SampleStream[Sample]":
        """The same as a stream, which shuffles anew in each epoch and can be resumed.

        Args:
            num_shards: Most worker processes that may share the work.
        """
        return SampleStream(self.reader, self.broken, table=self.table, num_shards=num_shards)


class WithoutGaps(torch_data.Dataset, Generic[Sample]):
    """Samples by number, where the next stands in for one that cannot be used.

    For training, where a batch may be so small that it would else be empty; what is evaluated
    counts each sample once.

    Args:
        samples: By number, None where one cannot be used.
    """

    def __init__(self, samples: Any):
        self.datasets = (samples,)  # as others call what they are made of

    def __len__(self) -> int:
        return len(self.datasets[0])

    def __getitem__(self, index: int) -> Sample:
        (samples,) = self.datasets
        if not 0 <= index < len(samples):
            raise IndexError(f"There is no sample {index} among {len(samples)}.")
        for step in range(len(samples)):
            sample = samples[(index + step) % len(samples)]
            if sample is not None:
                return sample
        raise ValueError(f"None of the {len(samples)} samples of a dataset can be read.")

    def set_epoch(self, epoch: int) -> None:
        """Choose what the samples choose anew in each epoch."""
        if hasattr(self.datasets[0], "set_epoch"):
            self.datasets[0].set_epoch(epoch)


class SampleStream(torch_data.IterableDataset, Generic[Sample]):
    """Samples one after another, shared out among ranks and worker processes.

    Args:
        reader: Of the format.
        broken: Where to note what cannot be used.
        table: `datasets.Dataset` of the records, or None to read the reader's shards.
        choice: Records to take out of the shards.
        num_shards: Parts to cut the table into.
    """

    def __init__(
        self,
        reader: Reader[Sample],
        broken: BrokenRecords,
        table: Any = None,
        choice: Choice | None = None,
        num_shards: int = 64,
    ):
        self.reader, self.broken, self.table = reader, broken, table
        self.choice, self.num_shards = choice or Choice(), num_shards
        self.seed: int | None = None
        self.buffer_size = 1
        self.rank, self.world_size = 0, 1
        self.epoch = shared_number()
        self.records: Any = None  # of the running epoch
        self.resumed: dict[str, Any] | None = None

    def shuffle(self, seed: int, buffer_size: int = 256) -> "SampleStream[Sample]":
        """Shuffled anew in each epoch: a table wholly; shards in their order and within a buffer.

        Args:
            seed: Another one gives other orders.
            buffer_size: Undecoded records of a shard to choose the next from.
        """
        shuffled = self.copied()
        shuffled.seed, shuffled.buffer_size = seed, buffer_size
        return shuffled

    def split(self, rank: int, world_size: int) -> "SampleStream[Sample]":
        """The part of one of several processes; together they have every record once."""
        part = self.copied()
        part.rank, part.world_size = rank, world_size
        return part

    def copied(self) -> "SampleStream[Sample]":
        """The same from the beginning of the epoch, with an epoch and a position of its own."""
        copied = copy(self)
        copied.epoch, copied.records, copied.resumed = self.epoch.clone(), None, None
        copied.epoch.share_memory_()
        return copied

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch, and what the reader chooses anew in each."""
        self.epoch.fill_(epoch)
        self.reader.set_epoch(epoch)

    def __iter__(self) -> Iterator[Sample]:
        self.records = self.ordered_records()
        if self.resumed is not None:
            self.records.load_state_dict(self.resumed)
            self.resumed = None
        for row in self.records:
            sample = read_row(self.reader, row, self.broken)
            if sample is not None:
                yield sample

    def state_dict(self) -> dict[str, Any]:
        """Where in which epoch this is; what comes next after `load_state_dict` is the same.

        Worker processes of a `DataLoader` have streams of their own: take the state of torchdata's
        `StatefulDataLoader` then, which asks each of them.
        """
        if self.resumed is not None:
            position = self.resumed
        else:
            position = None if self.records is None else self.records.state_dict()
        return {"epoch": int(self.epoch), "position": position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, in the next iteration, where `state_dict` was called."""
        self.set_epoch(state["epoch"])
        self.resumed = state["position"]

    def ordered_records(self) -> Any:
        """The records of this epoch and rank as a `datasets.IterableDataset`."""
        datasets = import_datasets()
        from datasets.distributed import split_dataset_by_node

        seeds = None if self.seed is None else [self.seed, int(self.epoch)]
        if self.table is not None:
            table = self.table
            if seeds is not None:
                table = table.shuffle(generator=np.random.default_rng(seeds))
            records = table.to_iterable_dataset(num_shards=max(1, min(self.num_shards, len(table))))
        else:
            shards = self.reader.shards()
            if seeds is not None:
                order = np.random.default_rng(seeds).permutation(len(shards))
                shards = [shards[index] for index in order]
            arguments = {
                "reader": self.reader,
                "shards": shards,
                "choice": self.choice,
                "seeds": None if seeds is None else tuple(seeds),  # only shards may be a list
                "buffer_size": self.buffer_size,
            }
            records = datasets.IterableDataset.from_generator(
                records_of_shards, gen_kwargs=arguments
            )
        return split_dataset_by_node(records, rank=self.rank, world_size=self.world_size)


def load(
    reader: Reader[Sample],
    streaming: bool = False,
    on_error: str = "skip",
    fraction: float | None = None,
    subset_seed: int = 0,
    names: Collection[str] | None = None,
    broken_list: str | os.PathLike | None = None,
) -> Any:
    """The samples of a dataset: `Samples`, or a `SampleStream` if streaming.

    Args:
        reader: Of the format, which knows folder and split.
        streaming: Read from beginning to end, which is all that a tar far away allows.
        on_error: "skip" what cannot be used, with a warning and a list at the end, or "raise".
        fraction: Share of the records to take, e.g. 0.01. The same ones for each way of loading.
        subset_seed: Another one takes others.
        names: Records to take, instead.
        broken_list: File that keeps the list of what was skipped, which is also logged at the end.
    """
    broken = BrokenRecords(on_error, broken_list)
    choice = Choice(fraction, subset_seed, names)
    if streaming and reader.shards():
        return SampleStream(reader, broken, choice=choice)
    datasets = import_datasets()
    chosen, texts = [], []
    for name, record in reader.records():
        if name in choice:
            chosen.append(name)
            texts.append(json.dumps(record))
    if not chosen:
        raise ValueError(f"{reader} has no records, or none that were chosen.")
    features = datasets.Features(
        {"id": datasets.Value("string"), "record": datasets.Value("large_string")}
    )
    table = datasets.Dataset.from_dict({"id": chosen, "record": texts}, features=features)
    samples = Samples(reader, table, broken)
    return samples.stream() if streaming else samples


def read_row(reader: Reader[Sample], row: dict[str, Any], broken: BrokenRecords) -> Sample | None:
    """The sample of a row, or None, noted, if it cannot be used."""
    try:
        return reader.read(json.loads(row["record"]) if "record" in row else row)
    except DAMAGE as error:
        broken.add(row["id"], error)
        return None


def records_of_shards(
    reader: Reader,
    shards: list[str],
    choice: Choice,
    seeds: tuple[int, ...] | None,
    buffer_size: int,
) -> Iterator[Record]:
    """Chosen records of each shard, shuffled within a buffer.

    The order in a shard depends on its name and the seeds alone, so that it is the same again when
    an epoch is resumed.
    """
    for shard in shards:
        rows = ({"id": name, **row} for name, row in reader.records_of_shard(shard))
        chosen = (row for row in rows if row["id"] in choice)
        if seeds is None or buffer_size == 1:
            yield from chosen
            continue
        digest = hashlib.blake2b(shard.encode(), digest_size=8).digest()
        generator = np.random.default_rng([*seeds, int.from_bytes(digest, "big")])
        buffer: list[Record] = []
        for row in chosen:
            if len(buffer) < buffer_size:
                buffer.append(row)
                continue
            index = int(generator.integers(buffer_size))
            buffer[index], row = row, buffer[index]
            yield row
        yield from (buffer[index] for index in generator.permutation(len(buffer)))


def shared_number() -> torch.Tensor:
    """A whole number that worker processes see change, since they may outlive an epoch."""
    return torch.zeros((), dtype=torch.long).share_memory_()


def import_datasets() -> Any:
    """Hugging Face datasets, or an error that says how to get it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "Datasets are ordered and streamed by Hugging Face datasets: "
            'pip install "efficientsam3-hf[train]".'
        ) from error
    return datasets
