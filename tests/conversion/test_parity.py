"""Whole files in released form: converted, compared with the reference, and written back.

The weights are random, but keys, shapes and forms are those of released files.
"""

from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import pytest
import torch

from conversion import convert, export_original, verify
from conversion.golden import GoldenCase
from conversion.manifest import read_manifest as read_record
from tests.parity.materialise import build, find_case, read_manifest, wrap

CASES = {
    "ev_s_s1_ctx32": "efficientsam3-efficientvit-s-mobileclip-s1-ctx32",
    "rv_m_s0_ctx16": "efficientsam3-repvit-m",
    "tv_s_teacher_inst": "efficientsam3-tinyvit-s-sam3text",
}
VARIANTS = ("variant_trainer_noprefix", "variant_legacy_student_trunk")

pytestmark = pytest.mark.slow


@pytest.fixture
def space(tmp_path) -> Iterator[Path]:
    """A folder whose gigabytes go with the test."""
    yield tmp_path
    rmtree(tmp_path)


def write_file(
    case: str, folder: Path, part: str = "checkpoint", manifest: str = "manifest"
) -> Path:
    path = folder / f"{manifest}_{part}.pt"
    wrapper = read_manifest(case, manifest)[part]["wrapper"]
    torch.save(wrap(build(case, part, manifest), wrapper), path)
    return path


def run_convert(source: Path, output: Path, *options: str) -> dict:
    assert convert.main([str(source), "--output", str(output), "--quiet", *options]) == 0
    record = read_record(output)
    assert record is not None
    return record


def donor_options(case: str, folder: Path) -> list[str]:
    if "donor" not in read_manifest(case):
        return []
    return ["--donor", str(write_file(case, folder, "donor"))]


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_reference(case: str, space: Path):
    source = write_file(case, space)

    record = run_convert(source, space / "model", *donor_options(case, space))

    assert record["name"] == CASES[case]
    rows = verify.verify(space / "model", GoldenCase(find_case(case)))
    assert all(row.passes for row in rows), verify.format_table(rows)
    assert len(rows) > 50


@pytest.mark.parametrize("case", CASES)
def test_the_way_back_is_exact(case: str, space: Path):
    source = write_file(case, space)
    options = donor_options(case, space)
    run_convert(source, space / "model", *options)

    export_original.export(space / "model", space / "back.pt")

    released = torch.load(source, mmap=True, weights_only=True)["model"]
    for donor in options[1:]:
        released |= torch.load(donor, mmap=True, weights_only=True)["model"]
    back = torch.load(space / "back.pt", mmap=True, weights_only=True)["model"]
    assert back.keys() == released.keys()
    assert all(torch.equal(back[key], released[key]) for key in released)


def test_awkward_forms_give_the_same_weights(space: Path):
    case = "rv_m_s0_ctx16"
    options = donor_options(case, space)
    plain = run_convert(write_file(case, space), space / "plain", *options)

    for variant in VARIANTS:
        source = write_file(case, space, manifest=variant)
        record = run_convert(source, space / variant, *options)
        assert record["target"] == plain["target"]
