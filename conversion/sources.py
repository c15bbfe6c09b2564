"""From what a user types to files on this machine: paths, folders of files, `hf://` addresses."""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from .reading import (
    SUFFIXES,
    TRANSFORMERS_INDEX,
    TRANSFORMERS_WEIGHTS,
    is_transformers_folder,
)

HUB = re.compile(
    r"hf://(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)


@dataclass(frozen=True)
class Source:
    """One checkpoint to convert.

    Args:
        name: What to call it, without suffix; also the name of its folder among others.
        path: Where it lies on this machine.
        address: Where it is from, as far as others can use it: an `hf://` address or a file name.
    """

    name: str
    path: Path
    address: str


def find_sources(source: str) -> list[Source]:
    """The checkpoint that a path or address stands for, or all of a folder of them."""
    if source.startswith("hf://"):
        return _find_on_hub(source)
    path = Path(source)
    if path.is_dir() and not is_transformers_folder(path):
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise FileNotFoundError(f"{path} holds no {', '.join(SUFFIXES)} file.")
        _refuse_same_names({file.name: file.stem for file in files})
        return [Source(file.stem, file, file.name) for file in files]
    if not path.exists():
        raise FileNotFoundError(
            f"There is no file or folder {source}. A file on the Hub is written "
            f"hf://OWNER/REPOSITORY/PATH."
        )
    return [Source(path.stem, path, path.name)]


def find_donor(donor: str) -> Source:
    """The one checkpoint that is to give what others lack."""
    sources = find_sources(donor)
    if len(sources) > 1:
        names = ", ".join(source.path.name for source in sources)
        raise ValueError(f"{donor} holds {len(sources)} files ({names}): name one as the donor.")
    return sources[0]


def _find_on_hub(address: str) -> list[Source]:
    match = HUB.fullmatch(address)
    if match is None:
        raise ValueError(
            f"{address!r} is no Hub address: write hf://OWNER/REPOSITORY/PATH, or "
            f"hf://OWNER/REPOSITORY@REVISION/PATH."
        )
    repo, revision, path = match["repo"], match["revision"], (match["path"] or "").strip("/")
    try:
        if path.endswith(SUFFIXES):
            return [_download(repo, revision, path, PurePosixPath(path).stem)]
        files = HfApi().list_repo_files(repo, revision=revision)
        inside = [file for file in files if not path or file.startswith(f"{path}/")]
        has_weights = TRANSFORMERS_WEIGHTS in files or TRANSFORMERS_INDEX in files
        if not path and "config.json" in files and has_weights:
            patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
            folder = snapshot_download(repo, revision=revision, allow_patterns=patterns)
            return [Source(repo.split("/")[1], Path(folder), address)]
        wanted = [file for file in inside if file.endswith(SUFFIXES)]
        if not wanted:
            raise FileNotFoundError(f"{address} holds no {', '.join(SUFFIXES)} file.")
        names = {file: "-".join(_below(file, path).with_suffix("").parts) for file in wanted}
        _refuse_same_names(names)
        return [_download(repo, revision, file, name) for file, name in names.items()]
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = [line for line in str(error).splitlines() if line] or [type(error).__name__]
        raise OSError(
            f"{address} could not be fetched: {' '.join(reason[:2])} Check the address and the "
            f"network; for gated files, accept the terms on the Hub and run `hf auth login`."
        ) from error


def _below(file: str, folder: str) -> PurePosixPath:
    return PurePosixPath(file).relative_to(folder or ".")


def _refuse_same_names(names: dict[str, str]) -> None:
    """Raise if two files would be written to one folder."""
    first: dict[str, str] = {}
    for file, name in names.items():
        if name in first:
            raise ValueError(
                f"{first[name]} and {file} would both be written to {name!r}. Convert them one by "
                f"one, each with an --output of its own."
            )
        first[name] = file


def _download(repo: str, revision: str | None, path: str, name: str) -> Source:
    local = hf_hub_download(repo, path, revision=revision)
    at = f"@{revision}" if revision else ""
    return Source(name, Path(local), f"hf://{repo}{at}/{path}")
