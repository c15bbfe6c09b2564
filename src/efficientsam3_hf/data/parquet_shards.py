"""Rows of parquet files, near or far, a group of rows at a time."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from .files import list_below, list_names, open_file


def find_shards(path: str, pattern: str = "*.parquet") -> list[str]:
    """A file itself, or those of a folder and all below it that fit a pattern."""
    if str(path).endswith(".parquet"):
        return [str(path)]
    shards = list_below(str(path), pattern)
    if not shards:
        raise FileNotFoundError(
            f"{path} holds no {pattern}, but {', '.join(list_names(str(path))[:5]) or 'nothing'}."
        )
    return shards


def column_names(path: str) -> list[str]:
    """Of a file."""
    with open_parquet(path) as file:
        return list(file.schema_arrow.names)


def count_rows(path: str) -> list[int]:
    """Rows of each group of a file."""
    with open_parquet(path) as file:
        return [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]


def iterate_rows(path: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a file in order."""
    with open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=256, columns=list(columns)):
            yield from batch.to_pylist()


@lru_cache(maxsize=2)
def read_group(path: str, group: int, columns: tuple[str, ...]) -> Any:
    """A table of one group of rows; the last ones are kept, since neighbours are asked for next."""
    with open_parquet(path) as file:
        return file.read_row_group(group, columns=list(columns))


def write_shards(
    rows: Iterable[dict[str, Any]], folder: str | Path, prefix: str, per_shard: int = 1000
) -> None:
    """Write rows as `{prefix}-00000-of-00002.parquet`, ...

    Args:
        rows: With the same columns each.
        folder: To write to.
        prefix: Of the names, such as the split.
        per_shard: Rows in each file.
    """
    pyarrow, parquet = import_pyarrow()
    rows, folder = list(rows), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    count = -(-len(rows) // per_shard)
    for number in range(count):
        table = pyarrow.Table.from_pylist(rows[number * per_shard : (number + 1) * per_shard])
        path = folder / f"{prefix}-{number:05d}-of-{count:05d}.parquet"
        parquet.write_table(table, path, row_group_size=100)


@contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """A `ParquetFile`."""
    _, parquet = import_pyarrow()
    with open_file(path) as source, parquet.ParquetFile(source) as file:
        yield file


def import_pyarrow() -> tuple[Any, Any]:
    """pyarrow and its parquet module, or an error that says how to get them."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            'Parquet files are read by pyarrow: pip install "efficientsam3-hf[train]".'
        ) from error
    return pyarrow, parquet
