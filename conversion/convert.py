#!/usr/bin/env python3
"""Turn a released SAM 3 or EfficientSAM3 file into a folder that `from_pretrained` reads."""

import argparse
import copy
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it is in no package

from conversion.checking import refuse_misfits
from conversion.donors import complete, name_weights
from conversion.folder import (
    atomic_folder,
    refuse_overwriting,
    write_card,
    write_companions,
    write_extras,
    write_weights,
)
from conversion.manifest import (
    count_rules,
    describe_dropped,
    describe_file,
    describe_parts,
    describe_versions,
    format_report,
    write_manifest,
)
from conversion.reading import WeightFile, read_weights
from conversion.recognition import Variant, fit_parts, recognise
from conversion.renaming import find_moves
from conversion.restoring import find_extras
from conversion.sources import Source, find_donor, find_sources
from efficientsam3_hf.models.configuration_efficientsam3 import EfficientSam3Config

HELP = """\
SOURCE is one of

  FILE.pt, .pth, .safetensors     a released file, in any of the forms that were published
  FOLDER                          every such file in it; each becomes a folder below --output
  hf://OWNER/REPO/PATH            the same on the Hub (hf://OWNER/REPO@REVISION/PATH for a revision)

What a file holds is recognised from its weights: trunk, size, text tower, context length. Every
tensor is converted, or left out for a reason that is printed; anything else stops the conversion.
Nothing in a pickle is run. --output appears when it is complete, or not at all.

examples

  python conversion/convert.py efficient_sam3_tinyvit_s.pt --output tinyvit-s
  python conversion/convert.py hf://OWNER/REPO/stage3.pt --donor sam3.pt --output repvit-m
  python conversion/convert.py downloads/ --donor hf://facebook/sam3 --output converted/

Fine-tuned files lack the geometry encoder, without which there is no model, and the tracker. Both
were left as they were in SAM 3, so that --donor can give them: Meta's sam3.pt, a folder of
transformers' facebook/sam3, or any file that holds them.
"""


def convert(
    source: Source,
    output: Path,
    donor: Source | None = None,
    name: str | None = None,
    context_length: int | None = None,
    config: EfficientSam3Config | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Convert one checkpoint, and return the record that is saved with it.

    Args:
        source: What to convert.
        output: The folder to write.
        donor: Gives the parts that the source lacks.
        name: Variant in the zoo that it must be; None takes what the weights say.
        context_length: Tokens of a phrase, where the position table leaves a choice.
        config: Of a model whose sizes the zoo does not have, instead of recognition.
        overwrite: Whether to replace an output that exists.
        show_progress: Whether to draw progress bars.
    """
    refuse_overwriting(output, [source.path, *([donor.path] if donor else [])])
    file = read_weights(source.path)
    renamed = name_weights(file.weights)
    donor_file = read_weights(donor.path) if donor else None
    completed = complete(
        renamed.weights,
        source.address,
        name_weights(donor_file.weights).weights if donor_file else None,
        donor.address if donor else None,
    )
    if config is None:
        variant = recognise(completed.weights, name, context_length)
    else:
        own = copy.deepcopy(config)
        notes = fit_parts(own, completed.weights)
        variant = Variant("a variant of its own", own, tuple(notes))
    refuse_misfits(variant.config, completed.weights)
    extras = find_extras(file.weights, renamed)

    record: dict[str, Any] = {
        "name": variant.name,
        "source": _describe(source, file, show_progress),
        "donor": _describe(donor, donor_file, show_progress) if donor and donor_file else None,
        "parts": describe_parts(completed.weights, completed.donated),
        "dropped": describe_dropped({**renamed.dropped, **file.state}, extras),
        "notes": [*variant.notes, *completed.notes],
        "versions": describe_versions(),
        "rules": count_rules(find_moves(file.weights)),
        "converted": find_moves(file.weights),
    }
    with atomic_folder(output, overwrite) as folder:
        write_companions(variant.config, folder)
        files = write_weights(completed.weights, folder) + write_extras(extras, folder)
        record["target"] = [describe_file(path, show_progress) for path in files]
        write_manifest(record, folder)
        write_card(folder, output)
    return record


def _describe(source: Source, file: WeightFile, show_progress: bool) -> dict[str, Any]:
    return {
        "address": source.address,
        "wrapper": file.wrapper,
        "tensors": len(file.weights),
        "files": [describe_file(path, show_progress) for path in file.paths],
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="what to convert; see below")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--donor", help="gives what SOURCE lacks; see below")
    parser.add_argument(
        "--name", help="variant that SOURCE must be, e.g. efficientsam3-repvit-m; else an error"
    )
    parser.add_argument(
        "--context-length",
        type=int,
        help="tokens of a phrase, for a position table of 77 rows (default: 32, to which the "
        "released files with such a table interpolate it)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Convert all that the command line names; 1 if anything failed."""
    options = parse_arguments(arguments)
    failures = []
    try:
        sources = find_sources(options.source)
        donor = find_donor(options.donor) if options.donor else None
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for source in sources:
        is_alone = len(sources) == 1 and not _is_folder_of_files(options.source, source)
        output = options.output if is_alone else options.output / source.name
        try:
            record = convert(
                source,
                output,
                donor=donor,
                name=options.name,
                context_length=options.context_length,
                overwrite=options.overwrite,
                show_progress=not options.quiet,
            )
        except (ValueError, OSError) as error:
            which = "" if len(sources) == 1 else f"{source.address}: "
            print(f"error: {which}{error}", file=sys.stderr)
            failures.append(source.address)
            continue
        print(format_report(record))
        print(f"\nwritten: {output}\n")
    if failures and len(sources) > 1:
        print(f"{len(failures)} of {len(sources)} failed: {', '.join(failures)}", file=sys.stderr)
    return 1 if failures else 0


def _is_folder_of_files(typed: str, source: Source) -> bool:
    return Path(typed).is_dir() and source.path != Path(typed)


def end_on_sigterm() -> None:
    """Leave nothing half written behind when the process is asked to end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
