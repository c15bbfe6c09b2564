"""Records in tars, near or far: what belongs together has a common name, at whatever depth."""

import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from .files import is_remote, open_file, read_bytes
from .loading import Record

# Of the name of a file: which record it belongs to, and which of its parts it is.
PartOf = Callable[[str], tuple[str, str] | None]

# Records of a far tar that may wait for the rest of their parts.
MOST_WAITING = 512


def read_tar(path: str, part_of: PartOf, kinds: Collection[str]) -> Iterator[tuple[str, Record]]:
    """Records of a tar: where their parts are, or, far away, the parts themselves.

    Args:
        path: Of the tar. One at an address is read once from beginning to end.
        part_of: Says what a file is; None for others, which are left out.
        kinds: Parts that make a record whole.
    """
    return contents_of_tar(path, part_of, kinds) if is_remote(path) else index_of_tar(path, part_of)


def index_of_tar(path: str, part_of: PartOf) -> Iterator[tuple[str, Record]]:
    """Where in a tar the parts of each record are."""
    found: dict[str, Record] = {}
    damage = None
    with open_file(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    part = part_of(Path(member.name).name) if member.isfile() else None
                    if part is not None:
                        name, kind = part
                        record = found.setdefault(name, {"name": name, "tar": path})
                        record[kind] = [member.offset_data, member.size]
        except tarfile.TarError as error:
            damage = f"The tar {path} is damaged: {error}"
    yield from found.items()
    if damage is not None:
        yield path, {"damage": damage}


def contents_of_tar(
    path: str, part_of: PartOf, kinds: Collection[str]
) -> Iterator[tuple[str, Record]]:
    """The parts of each record of a tar, which is read once from beginning to end."""
    waiting: dict[str, Record] = {}
    with open_file(path, from_end_to_end=True) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|") as tar:
                for member in tar:
                    part = part_of(Path(member.name).name) if member.isfile() else None
                    if part is None:
                        continue
                    name, kind = part
                    record = waiting.setdefault(name, {"name": name, **dict.fromkeys(kinds)})
                    opened = tar.extractfile(member)
                    record[kind] = b"" if opened is None else opened.read()
                    if all(record[each] is not None for each in kinds):
                        yield name, waiting.pop(name)
                    elif len(waiting) > MOST_WAITING:
                        raise tarfile.ReadError(
                            f"parts of more than {MOST_WAITING} records are far apart; "
                            "fetch it, to read it from disk"
                        )
        except tarfile.TarError as error:
            yield path, {"damage": f"The tar {path} is damaged: {error}"}
    yield from waiting.items()  # of which a part is missing


def read_part(record: Record, kind: str) -> bytes:
    """One part of a record; it is there itself, or its path, or its place in the tar."""
    if "damage" in record:
        raise ValueError(record["damage"])
    part = record.get(kind)
    if part is None:
        raise FileNotFoundError(f"There is no {record['name']}.{kind}.")
    if isinstance(part, bytes):
        return part
    if isinstance(part, str):
        return read_bytes(part)
    offset, size = part
    return read_bytes(record["tar"], offset, size)


def pack_tars(
    records: Iterable[Sequence[Path]], pattern: str, per_tar: int, inside: str = "."
) -> None:
    """Move the files of records into tars.

    Args:
        records: Paths of the files of each.
        pattern: Path of the tars, with a place for their number.
        per_tar: Records in each.
        inside: Folder within the tars.
    """
    records = list(records)
    for start in range(0, len(records), per_tar):
        with tarfile.open(pattern.format(start // per_tar), "w") as tar:
            for path in (path for record in records[start : start + per_tar] for path in record):
                tar.add(path, f"{inside}/{path.name}")
                path.unlink()
