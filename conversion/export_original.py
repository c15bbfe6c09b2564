#!/usr/bin/env python3
"""Write a converted or trained folder back as a file in released form."""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it is in no package

import torch
from torch import Tensor

from conversion.donors import name_weights
from conversion.folder import EXTRAS_FILE
from conversion.manifest import read_manifest
from conversion.reading import read_weights
from conversion.restoring import restore

HELP = """\
OUT.pt holds {"model": state_dict} with the keys of a complete release: detector.* and tracker.*.
What conversion set aside, because no model reads it, is put back. Left-overs of another model are
not: they were never part of this one.

example

  python conversion/export_original.py tinyvit-s tinyvit_s.pt
"""


def export(folder: Path, output: Path, overwrite: bool = False) -> dict[str, Tensor]:
    """Write the released form of a folder's weights, and return them.

    Args:
        folder: What `convert.py` or `save_pretrained` wrote.
        output: The file to write.
        overwrite: Whether to replace an output that exists.
    """
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists already. Choose another name, or pass --overwrite.")
    extras = folder / EXTRAS_FILE
    record = read_manifest(folder) or {}
    weights = restore(
        name_weights(read_weights(folder).weights).weights,
        read_weights(extras).weights if extras.is_file() else {},
        record.get("converted"),
    )
    # torch saves whole storages, also those of which a tensor is a part
    weights = {key: tensor.clone() for key, tensor in weights.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as beside:
        partial = Path(beside) / output.name
        torch.save({"model": weights}, partial)
        partial.replace(output)
    return weights


def main(arguments: list[str] | None = None) -> int:
    """Export the folder that the command line names; 1 if that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of a model")
    parser.add_argument("output", metavar="OUT.pt", type=Path, help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    options = parser.parse_args(arguments)
    try:
        weights = export(options.folder, options.output, options.overwrite)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written: {options.output}, {len(weights):,} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
