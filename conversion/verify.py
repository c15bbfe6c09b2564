#!/usr/bin/env python3
"""Compare a converted folder with golden values of the reference implementation."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it is in no package

import torch
from torch import Tensor

from conversion.golden import GoldenCase
from conversion.runs import Kept, Run, run_concepts, run_tracker, stir_rounding

TOLERANCE = 1e-3
STRICT_TOLERANCE = 1e-4
STRICT = ("trunk.", "text.features_LBC", "text.input_embeds_LBC")
SEEDS = (0, 1)  # of the roundings tried: a second one where the first does not explain enough
NEAR_TIE = 1e-5  # a score this near the threshold may fall on either side of it

HELP = """\
The golden values come from another machine, and no two machines round alike. A random deep network
can amplify a rounding more than any fixed tolerance allows: then even a correct conversion fails,
and a wider tolerance would hide an incorrect one. So the network is asked: every input pixel is
moved by half a unit in its last place, up or down at random, and the column "sensitivity" says how
far each output moves at most, in one or two such tries. A difference passes if it is within 1e-3
(1e-4 for text features and trunk), or no larger than what this half unit does. --sensitivity auto,
the default, measures only for what exceeds the fixed tolerance, since a try may take as long again.

The instances above the score threshold must be the same ones, except where the golden scores
themselves come nearer to the threshold than 1e-5. Of binary masks, the difference is how far from
1/2 the probability of a pixel is that falls on the other side.

example

  python conversion/verify.py repvit-m --golden tests/parity/public/rv_m_s0_ctx16
"""


@dataclass(frozen=True)
class Row:
    """One output compared.

    Args:
        name: The golden tensor.
        difference: Largest absolute one.
        tolerance: The fixed one.
        sensitivity: How far rounding of the input moves it; None where it was not measured.
        remark: Why a row without numbers passes or fails.
    """

    name: str
    difference: float
    tolerance: float
    sensitivity: float | None = None
    remark: str = ""

    @property
    def passes(self) -> bool:
        return self.difference <= max(self.tolerance, self.sensitivity or 0.0)


def verify(folder: Path, case: GoldenCase, sensitivity: str = "auto") -> list[Row]:
    """Run all prompts of a case through a folder's models, and compare.

    Args:
        folder: What `convert.py` wrote.
        case: What the reference gave.
        sensitivity: `"always"`, `"never"`, or `"auto"` to measure it where something fails.
    """
    run = collect(folder, Run(case, lambda pixels: pixels))
    rows = list(compare(case, run))
    stirred: list[Run] = []
    for seed in SEEDS if sensitivity != "never" else ():
        asked = frozenset(row.name for row in rows if sensitivity == "always" or not row.passes)
        if not asked:
            break
        stir = partial(stir_rounding, seed=seed)
        stirred.append(collect(folder, Run(case, stir, wanted=asked)))
        rows = list(compare(case, run, stirred))
    return rows


@torch.no_grad()
def collect(folder: Path, run: Run) -> Run:
    """Every output that is wanted and that the case has values for."""
    run_concepts(folder, run)
    if run.case.meta.get("inst") and run.wants("inst."):
        run_tracker(folder, run)
    return run


def compare(case: GoldenCase, run: Run, stirred: Sequence[Run] = ()) -> Iterator[Row]:
    """One row for each golden tensor that the run has."""
    for name, values in run.outputs.items():
        difference = largest_difference(case.sample(name, values), case.values(name))
        tolerance = STRICT_TOLERANCE if name.startswith(STRICT) else TOLERANCE
        moves = [
            largest_difference(values, again.outputs[name])
            for again in stirred
            if name in again.outputs
        ]
        yield Row(name, difference, tolerance, max(moves, default=None))
    for tag, kept in run.kept.items():
        again = [other.kept[tag] for other in stirred if tag in other.kept]
        yield from compare_instances(case, tag, kept, again)


def compare_instances(
    case: GoldenCase, tag: str, kept: Kept, stirred: Sequence[Kept]
) -> Iterator[Row]:
    """The instances above the threshold: which they are, and what they look like."""
    threshold = case.meta[tag]["score_threshold"]
    probabilities = case.values(f"{tag}.probs")[0] if f"{tag}.probs" in case else None
    scores = kept.scores if probabilities is None else probabilities
    gap = (scores - threshold).abs().min().item()
    if probabilities is None:
        is_same = len(kept.indices) == len(case.values(f"{tag}.scores"))
    else:
        is_same = kept.indices.tolist() == (probabilities > threshold).nonzero().flatten().tolist()
    if not is_same:
        remark = f"differ, a score being {gap:.0e} from the threshold"
        difference = 0.0 if gap <= NEAR_TIE else float("inf")
        yield Row(f"{tag}: instances", difference, 0.0, None, remark)
        return
    yield Row(f"{tag}: instances", 0.0, 0.0, None, f"the same {len(kept.indices)}")
    for name, values in kept.sampled.items():
        golden = case.values(name)
        if name.endswith(".masks"):
            flipped = (values > 0.5) != golden
            difference = largest_difference(values[flipped], torch.full([], 0.5))
        else:
            difference = largest_difference(values, kept.scale(name, golden))
        moves = [
            largest_difference(values, again.sampled[name])
            for again in stirred
            if again.indices.tolist() == kept.indices.tolist()
        ]
        yield Row(name, difference, TOLERANCE, max(moves, default=None))


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; infinite where a value is not finite."""
    if one.numel() == 0:
        return 0.0
    difference = (one.double() - other.double()).abs()
    return torch.nan_to_num(difference, nan=float("inf")).max().item()


def format_table(rows: list[Row]) -> str:
    """The rows for the terminal."""
    lines = [f"{'output':36} {'difference':>11} {'tolerance':>10} {'sensitivity':>12}"]
    for row in rows:
        if row.remark:
            numbers = row.remark
        else:
            moved = "" if row.sensitivity is None else f"{row.sensitivity:.1e}"
            numbers = f"{row.difference:11.1e} {row.tolerance:10.0e} {moved:>12}"
        lines.append(f"{row.name:36} {numbers}{'' if row.passes else '  FAILS'}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if anything is too far off."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="what convert.py wrote")
    parser.add_argument("--golden", type=Path, required=True, metavar="CASE_DIR")
    parser.add_argument("--sensitivity", choices=["auto", "always", "never"], default="auto")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        rows = verify(options.folder, GoldenCase(options.golden), options.sensitivity)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    failed = [row for row in rows if not row.passes]
    print(format_table(rows))
    print(f"\n{len(rows) - len(failed)} of {len(rows)} outputs agree")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
