"""The comparison with golden values, on golden values of a tiny model's own."""

import json
from dataclasses import replace
from shutil import copyfile, copytree

import pytest
import torch
from PIL import Image
from released import convert_tiny, released, save
from safetensors.torch import load_file, save_file

from conversion import verify
from conversion.golden import GoldenCase
from conversion.runs import Run, stir_rounding

RECIPE = {
    "height": 112,
    "width": 112,
    "seed": 3,
    "octaves": [[4, 1.0], [12, 0.5]],
    "grain": 0.1,
    "gain": 45,
    "level": 120,
}
BOX = {"box_cxcywh": [0.4, 0.45, 0.3, 0.25], "positive": True}
POINT = {"point_xy": [0.3, 0.6], "positive": False}
CLICK = {"point_coords": [[30.0, 20.0]], "point_labels": [1]}
META = {
    "input": {"kind": "noise_image", "args": RECIPE},
    "texts": ["a red car", "visual"],
    "prompts": {
        "text": {"text": "a red car"},
        "visual_box": {"text": "visual", "boxes": [BOX]},
        "visual_point": {"text": "visual", "points": [POINT]},
    },
    "proc": {"image": "photo.png", "text": "person", "score_threshold": 0.0},
    "proc2": {"text": "person", "boxes": [BOX], "score_threshold": 0.0},
    "inst": {
        "image": "photo.png",
        "cases": {
            "point": {**CLICK, "multimask_output": True},
            "boxes": {"box": [[5.0, 5, 40, 30], [9, 9, 30, 30]], "multimask_output": False},
            "mask_refine": {**CLICK, "mask_input": "first", "multimask_output": False},
        },
    },
}


class Everything(dict):
    """Knows every name, so that a run keeps all that it can."""

    def __contains__(self, name):
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify")
    convert_tiny(save(released(), path / "tiny.pt"), path / "model")
    return path / "model"


@pytest.fixture(scope="module")
def golden(folder):
    """A case whose golden values are the model's own, each second element of the last dimension."""
    path = folder.parent / "case"
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (60, 80, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(folder.parent / "photo.png")
    save_file({"none": torch.zeros(0)}, path / "golden.safetensors")
    (path / "meta.json").write_text(json.dumps(META | {"tensors": {}}))
    case = GoldenCase(path)
    case.meta["tensors"] = Everything()
    case.values = lambda name: torch.zeros(5)  # as many instances as there are queries
    case.sample = lambda name, tensor: tensor
    run = verify.collect(folder, Run(case, lambda pixels: pixels))

    tensors = dict(run.outputs)
    for kept in run.kept.values():
        tensors |= kept.sampled
    for name in tensors:
        if name.endswith(".boxes"):
            tensors[name] = tensors[name] * torch.tensor([80.0, 60, 80, 60])
        elif name.endswith(".masks"):
            tensors[name] = tensors[name] > 0.5
    steps = {name: [1] * (value.ndim - 1) + [2] for name, value in tensors.items()}
    steps |= {name: [1] * value.ndim for name, value in tensors.items() if "proc" in name}
    sampled = {
        name: value[tuple(slice(None, None, step) for step in steps[name])].contiguous()
        for name, value in tensors.items()
    }
    about = {
        name: {"full_shape": list(value.shape), "steps": steps[name]}
        for name, value in tensors.items()
    }
    save_file(sampled, path / "golden.safetensors")
    (path / "meta.json").write_text(json.dumps(META | {"tensors": about}))
    return path


@pytest.fixture(scope="module")
def run(folder, golden):
    """What the folder's models compute of that case."""
    return verify.collect(folder, Run(GoldenCase(golden), lambda pixels: pixels))


def copied(golden, tmp_path):
    """The same case, that a test may change."""
    copytree(golden, tmp_path / "case")
    copyfile(golden.parent / "photo.png", tmp_path / "photo.png")
    return tmp_path / "case"


def changed(golden, tmp_path, name: str, by: float):
    """The same case with one value moved."""
    case = copied(golden, tmp_path)
    tensors = load_file(golden / "golden.safetensors")
    first = tensors[name].view(-1)[:1]
    first.copy_(~first if first.dtype == torch.bool else first + by)
    save_file(tensors, case / "golden.safetensors")
    return case


def test_a_folder_agrees_with_its_own_values(folder, golden, capsys):
    assert verify.main([str(folder), "--golden", str(golden)]) == 0

    table = capsys.readouterr().out
    for name in ("trunk.student_feature", "text.features_LBC", "visual_point.pred_masks"):
        assert name in table
    assert "proc: instances" in table
    assert "the same 5" in table
    assert "inst.mask_refine.low_res" in table
    assert "FAILS" not in table


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("text.pred_logits", 2e-3),
        ("text.features_LBC", 2e-4),
        ("inst.point.iou", 2e-3),
        ("proc2.boxes", 1.0),
    ],
)
def test_a_difference_fails(folder, golden, tmp_path, capsys, name, by):
    case = changed(golden, tmp_path, name, by)

    assert verify.main([str(folder), "--golden", str(case)]) == 1

    (line,) = [line for line in capsys.readouterr().out.splitlines() if "FAILS" in line]
    assert line.startswith(name)


def test_other_instances_fail(folder, golden, tmp_path):
    case = GoldenCase(changed(golden, tmp_path, "proc.probs", -1.0))

    rows = verify.verify(folder, case, sensitivity="never")

    failed = [row.name for row in rows if not row.passes]
    assert "proc: instances" in failed


@pytest.mark.parametrize(
    "name",
    [
        "text.input_ids",
        "text.padding_mask",
        "text.input_embeds_LBC",
        "text.decoder_presence_feats",
        "visual_box.geometry_mask",
        "neck.sam2.1",
        "inst.mask_refine.mask_input",
    ],
)
def test_what_is_on_the_way_is_compared_too(run, golden, tmp_path, name):
    case = GoldenCase(changed(golden, tmp_path, name, 1))

    (failed,) = [row.name for row in verify.compare(case, run) if not row.passes]

    assert failed == name


def test_a_model_that_computes_no_numbers_fails(run, golden):
    nothing = float("nan")
    nans = {name: v * nothing if v.is_floating_point() else v for name, v in run.outputs.items()}
    instances = {
        tag: replace(kept, scores=kept.scores * nothing, indices=kept.indices[:0], sampled={})
        for tag, kept in run.kept.items()
    }
    broken = replace(run, outputs=nans, kept=instances)

    rows = list(verify.compare(GoldenCase(golden), broken, [broken]))

    agreeing = {row.name.partition(".")[2] for row in rows if row.passes}
    assert agreeing == {"input_ids", "padding_mask", "geometry_mask"}
    failing = {row.name for row in rows if not row.passes}
    assert {"proc: instances", "proc2: instances"} < failing


def test_one_instance_more_fails_without_scores_of_all_queries(run, golden):
    case = GoldenCase(golden)
    case.meta["tensors"] = {"proc2.scores": case.meta["tensors"]["proc2.scores"]}
    case.values = lambda name: run.kept["proc2"].scores[1:]

    (row,) = verify.compare_instances(case, "proc2", run.kept["proc2"], [])

    assert not row.passes
    assert row.remark.startswith("1 differ")
    assert verify.find_skipped(case, [row]) == ["proc2.scores"]


def test_values_that_nothing_was_compared_with_are_listed(run, golden):
    case = GoldenCase(golden)
    case.meta["tensors"]["neck.sam3.3"] = {}

    rows = list(verify.compare(GoldenCase(golden), run))

    skipped = verify.find_skipped(case, rows)
    assert skipped == ["neck.sam3.3"]
    assert "not compared: neck.sam3.3" in verify.format_summary(rows, skipped)


def test_a_case_of_which_nothing_is_compared_is_an_error(folder, golden, tmp_path, capsys):
    case = copied(golden, tmp_path)
    about = json.loads((case / "meta.json").read_text())
    about["tensors"] = {"elsewhere": {"full_shape": [1], "steps": [1]}}
    about = {name: value for name, value in about.items() if name not in ("proc", "proc2", "inst")}
    (case / "meta.json").write_text(json.dumps(about))

    assert verify.main([str(folder), "--golden", str(case)]) == 1

    assert "no value that this folder's models compute: elsewhere" in capsys.readouterr().err


def test_sensitivity_is_measured_on_request(folder, golden):
    rows = verify.verify(folder, GoldenCase(golden), sensitivity="always")

    measured = {row.name: row.sensitivity for row in rows}
    assert 0 < measured["text.pred_masks"] < 1e-2
    assert measured["text.features_LBC"] == 0


def test_sensitivity_is_else_measured_for_what_needs_it(folder, golden, tmp_path):
    case = changed(golden, tmp_path, "visual_box.pred_logits", 2e-3)

    rows = verify.verify(folder, GoldenCase(case))

    measured = {row.name for row in rows if row.sensitivity is not None}
    assert "visual_box.pred_logits" in measured
    assert not any(name.startswith(("text.pred", "proc", "inst.")) for name in measured)


def test_a_row_passes_within_what_rounding_does():
    row = verify.Row("x", difference=0.005, tolerance=0.001, sensitivity=0.01, ceiling=0.01)
    assert row.passes
    assert row.is_excused
    assert not replace(row, sensitivity=0.004).passes
    assert not replace(row, sensitivity=10.0, ceiling=0.004).passes
    assert not replace(row, sensitivity=None).passes
    assert not replace(row, difference=float("nan")).passes
    infinite = float("inf")
    assert not replace(row, difference=infinite, sensitivity=infinite, ceiling=infinite).passes
    assert not replace(row, difference=0.0005).is_excused


def test_the_summary_says_how_many_pass_only_by_rounding():
    row = verify.Row("x", difference=0.005, tolerance=0.001, sensitivity=0.01, ceiling=0.01)

    summary = verify.format_summary([row, replace(row, difference=0.0)], [])

    assert "2 of 2 outputs agree" in summary
    assert "1 of them only within their sensitivity" in summary


def test_rounding_excuses_a_hundredth_of_the_values_and_no_text(run, golden):
    case = GoldenCase(golden)

    ceilings = {row.name: row.ceiling for row in verify.compare(case, run)}

    assert ceilings["text.features_LBC"] == ceilings["text.input_ids"] == 0
    largest = case.values("text.pred_logits").abs().max().item()
    assert ceilings["text.pred_logits"] == pytest.approx(largest / 100)
    assert ceilings["proc.boxes"] <= 0.02  # of shares of the image, as they are compared


def test_rounding_is_stirred_by_half_a_unit():
    pixels = torch.linspace(-1, 1, 1000)

    moved = (stir_rounding(pixels, seed=0) - pixels).abs()

    assert ((moved / pixels.abs())[pixels != 0] <= 2**-22).all()
    assert (moved > 0).float().mean() > 0.9


def test_a_folder_without_golden_values_is_refused(folder, tmp_path, capsys):
    assert verify.main([str(folder), "--golden", str(tmp_path)]) == 1

    assert "no meta.json" in capsys.readouterr().err
