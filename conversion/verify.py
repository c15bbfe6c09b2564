#!/usr/bin/env python3
"""Compare a converted folder with golden values of the reference implementation."""

import argparse
import math
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
TEXT = ("text.features_LBC", "text.input_embeds_LBC", "text.input_ids", "text.padding_mask")
STRICT = ("trunk.", *TEXT)
AMPLIFIED = 0.01  # the largest share of the largest golden value that rounding can excuse
SEEDS = (0, 1)  # of the roundings tried: a second one where the first does not explain enough
NEAR_TIE = 1e-5  # a score this near the threshold may fall on either side of it

HELP = """\
The golden values come from another machine, and no two machines round alike. A random deep network
can amplify a rounding more than any fixed tolerance allows: then even a correct conversion fails,
and a wider tolerance would hide an incorrect one. So the network is asked: every input pixel is
moved by half a unit in its last place, up or down at random, and the column "sensitivity" says how
far each output moves at most, in one or two such tries. A difference passes if it is within 1e-3
(1e-4 for text features and trunk), or no larger than what this half unit does. That excuse goes up
to a hundredth of the largest golden value, and text, which no pixel moves, has none. --sensitivity
auto, the default, measures only for what exceeds the fixed tolerance, since a try may take as long
again.

The instances above the score threshold must be the same ones, except those whose scores come nearer
to the threshold than 1e-5; without golden scores of all queries, there must be as many. Of binary
masks, the difference is how far from 1/2 the probability of a pixel is that falls on the other
side. What the case has values for and is not compared is listed.

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
        ceiling: How much of that counts.
        remark: Why a row without numbers passes or fails.
    """

    name: str
    difference: float
    tolerance: float
    sensitivity: float | None = None
    ceiling: float = 0.0
    remark: str = ""

    @property
    def passes(self) -> bool:
        excused = min(self.sensitivity or 0.0, self.ceiling)
        return math.isfinite(self.difference) and self.difference <= max(self.tolerance, excused)

    @property
    def is_excused(self) -> bool:
        """Whether it passes only because rounding moves it so far."""
        return self.passes and self.difference > self.tolerance


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
    if not rows:
        raise ValueError(
            f"{case.folder} has no value that this folder's models compute: {', '.join(case)}."
        )
    return rows


@torch.no_grad()
def collect(folder: Path, run: Run) -> Run:
    """Every output that is wanted and that the case has values for."""
    run_concepts(folder, run)
    has_tracker = run.case.meta.get("inst") or "neck.sam2.0" in run.case
    if has_tracker and (run.wants("inst.") or run.wants("neck.sam2.")):
        run_tracker(folder, run)
    return run


def compare(case: GoldenCase, run: Run, stirred: Sequence[Run] = ()) -> Iterator[Row]:
    """One row for each golden tensor that the run has."""
    for name, values in run.outputs.items():
        golden = case.values(name)
        difference = largest_difference(case.sample(name, values), golden)
        tolerance = STRICT_TOLERANCE if name.startswith(STRICT) else TOLERANCE
        ceiling = 0.0 if name.startswith(TEXT) else largest_excuse(golden)
        moves = [
            largest_difference(values, again.outputs[name])
            for again in stirred
            if name in again.outputs
        ]
        yield Row(name, difference, tolerance, max(moves, default=None), ceiling)
    for tag, kept in run.kept.items():
        again = [other.kept[tag] for other in stirred if tag in other.kept]
        yield from compare_instances(case, tag, kept, again)


def compare_instances(
    case: GoldenCase, tag: str, kept: Kept, stirred: Sequence[Kept]
) -> Iterator[Row]:
    """The instances above the threshold: which they are, and what they look like."""
    name = f"{tag}: instances"
    threshold = case.meta[tag]["score_threshold"]
    if not kept.scores.isfinite().all():
        yield Row(name, math.inf, 0.0, remark="scores that are no numbers")
        return
    if f"{tag}.probs" in case:
        golden_scores = case.values(f"{tag}.probs")[0]
        other = (kept.scores > threshold) != (golden_scores > threshold)
        differing, same = golden_scores[other], f"the same {len(kept.indices)}"
    else:  # of the golden scores, only those above the threshold are known
        excess = len(kept.indices) - len(case.values(f"{tag}.scores"))
        by_distance = kept.scores[(kept.scores - threshold).abs().argsort()]
        differing, same = by_distance[: abs(excess)], f"as many, {len(kept.indices)}"
    if len(differing):
        gap = (differing - threshold).abs().max().item()
        remark = f"{len(differing)} differ, up to {gap:.0e} from the threshold"
        yield Row(name, 0.0 if gap <= NEAR_TIE else math.inf, 0.0, remark=remark)
        return
    yield Row(name, 0.0, 0.0, remark=same)
    for name, values in kept.sampled.items():
        golden = kept.scale(name, case.values(name))
        if name.endswith(".masks"):
            flipped = (values > 0.5) != golden
            difference = largest_difference(values[flipped], torch.full([], 0.5))
        else:
            difference = largest_difference(values, golden)
        moves = [
            largest_difference(values, again.sampled[name])
            for again in stirred
            if again.indices.tolist() == kept.indices.tolist()
        ]
        yield Row(name, difference, TOLERANCE, max(moves, default=None), largest_excuse(golden))


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; infinite where a value is not finite."""
    if one.numel() == 0:
        return 0.0
    difference = (one.double() - other.double()).abs()
    return torch.nan_to_num(difference, nan=float("inf")).max().item()


def largest_excuse(golden: Tensor) -> float:
    """How far rounding may be said to move values of this size."""
    return AMPLIFIED * golden.double().abs().max().item() if golden.numel() else 0.0


def find_skipped(case: GoldenCase, rows: list[Row]) -> list[str]:
    """What the case has values for, but nothing was compared with."""
    compared = {row.name for row in rows}
    return [name for name in case if name not in compared]


def format_summary(rows: list[Row], skipped: list[str]) -> str:
    """How many agree, how many of them only just, and what nobody looked at."""
    agreeing, excused = sum(row.passes for row in rows), sum(row.is_excused for row in rows)
    lines = [f"{agreeing} of {len(rows)} outputs agree"]
    if excused:
        lines.append(f"{excused} of them only within their sensitivity to rounding")
    if skipped:
        lines.append(f"not compared: {', '.join(skipped)}")
    return "\n".join(lines)


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
        case = GoldenCase(options.golden)
        rows = verify(options.folder, case, options.sensitivity)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_table(rows))
    print(f"\n{format_summary(rows, find_skipped(case, rows))}")
    return 0 if all(row.passes for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
