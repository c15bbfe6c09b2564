"""`efficientsam3 evaluate`: every task and family, several processes, killed runs, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficientsam3_hf.benchmarks.suite import TASKS
from efficientsam3_hf.cli.evaluate import TaskName
from efficientsam3_hf.evaluation import units

CPU = ("--device", "cpu", "--draws", "20")
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def numbers(folder: Path) -> dict[str, Any]:
    """What does not depend on when and by what command it was measured."""
    results = json.loads((folder / "results.json").read_text())
    return {each["metric"]: (each["value"], each["low"], each["high"]) for each in results}


def parts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.glob("parts/*/*.json"))}


def test_the_names_of_tasks_are_those_that_there_are():
    assert [each.value for each in TaskName] == list(TASKS)


@pytest.mark.parametrize(
    ("family", "left_out"),
    [
        ("ours", set()),
        ("sam3", set()),
        ("lite_text", {"coco-box", "clicks", "vos", "concept-video"}),
        ("edgetam", {"concept", "detection", "concept-video", "text", "features"}),
        ("sam2", {"concept", "detection", "concept-video", "text", "features"}),
    ],
)
def test_every_family_runs_through_the_same_command(
    family, left_out, command, world, request, tmp_path
):
    model = request.getfixturevalue(family)

    ran = command(
        *("evaluate", "-m", model, "--suite", "quick", "-d", world, "--teacher", model),
        *("-o", tmp_path, "--limit", 2, "--json", *CPU),
    )

    assert ran.code == 0, ran.err
    results = {entry["folder"].split("/")[-1]: entry for entry in ran.json}
    done = {name for name in TASKS if any(key.startswith(f"{name}-") for key in results)}
    assert done == set(TASKS) - left_out
    for name in left_out:
        assert f"{name}: left out, since the model cannot do" in ran.err
    for key, entry in results.items():
        assert entry["measurements"], key
        assert all(np.isfinite(each["value"]) for each in entry["measurements"])
        assert {(each["draws"], each["seed"]) for each in entry["measurements"]} == {(20, 0)}
        assert entry["skipped"] == []
    known = [entry["measurements"][0] for key, entry in results.items() if key.endswith("-coco")]
    assert {each["split"] for each in known} == {"val2017, first 2 of 4"}
    if "coco-box" in done:
        assert results["coco-box-coco"]["measurements"][0]["value"] > 0


def test_several_models_share_a_table(command, ours, edgetam, world, tmp_path):
    ran = command(
        *("evaluate", "-m", ours, "-m", edgetam, "--task", "coco-box", "-d", world / "coco"),
        *("-o", tmp_path, *CPU),
    )

    assert ran.code == 0, ran.err
    rows = [line for line in ran.out.splitlines() if line.startswith("| tiny-")]
    assert [row.split()[1] for row in rows] == [ours.name, edgetam.name]
    assert f"From {ours.name} to {edgetam.name}:" in ran.out
    (change,) = [line for line in ran.out.splitlines() if line.startswith("| COCO val2017 | mIoU")]
    assert "noise |" in change
    assert (tmp_path / "results.md").read_text() in ran.out


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(command, ours, world, tmp_path):
    arguments = ["evaluate", "-m", ours, "--task", "concept", "-d", world / "saco"]
    arguments += ["--batch-size", 1, *CPU]
    alone = command(*arguments, "-o", tmp_path / "one", "--json")

    together = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--cpu"),
            *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
            *("--dynamo_backend", "no", "--main_process_port", "0"),
            *("-m", "efficientsam3_hf.cli", *map(str, arguments)),
            *("-o", str(tmp_path / "two"), "--json"),
        ],
        env=OFFLINE,
        capture_output=True,
        text=True,
    )

    assert together.returncode == 0, together.stderr
    first, second = (
        Path(tmp_path / name) / ours.name / "concept-sa-co-gold" for name in ("one", "two")
    )
    assert alone.json[0]["predictions"]
    assert len(json.loads(together.stdout)) == 1  # only one of the processes speaks
    assert parts(first) == parts(second)
    assert len(parts(first)) == 4
    assert numbers(first) == numbers(second)
    for written in ("predictions/synthetic/predictions.json", "units-synthetic.npz"):
        assert (first / written).is_file()
    kept, again = (units.load(folder / "units-synthetic.npz") for folder in (first, second))
    assert all(np.array_equal(kept[name], again[name]) for name in kept)


DIES = """
import os, signal, sys
from efficientsam3_hf.benchmarks import journal
from efficientsam3_hf.cli.app import main

rename, count = os.replace, 0

def dies(*names):
    global count
    count += 1
    if count > 3:  # the settings and two parts are there, the third is written but has no name
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*names)

journal.os.replace = dies
sys.argv = ["efficientsam3", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(command, ours, world, tmp_path):
    arguments = ["evaluate", "-m", ours, "--task", "clicks", "--clicks", 2, "-d", world / "coco"]
    arguments += ["--batch-size", 1, *CPU]
    command(*arguments, "-o", tmp_path / "whole")
    killed = subprocess.run(
        [sys.executable, "-c", DIES, *map(str, arguments), "-o", str(tmp_path / "killed")],
        env=OFFLINE,
    )
    folder = tmp_path / "killed" / ours.name / "clicks-coco"
    assert killed.returncode == -signal.SIGKILL
    assert sorted(parts(folder)) == ["000000.json", "000001.json"]
    before = (folder / "parts" / "all" / "000000.json").stat().st_mtime_ns

    resumed = command(*arguments, "-o", tmp_path / "killed")

    whole = tmp_path / "whole" / ours.name / "clicks-coco"
    assert resumed.code == 0, resumed.err
    assert (folder / "parts" / "all" / "000000.json").stat().st_mtime_ns == before
    assert parts(folder) == parts(whole)
    assert numbers(folder) == numbers(whole)


def test_worker_processes_read_the_same(command, edgetam, world, tmp_path):
    arguments = ["evaluate", "-m", edgetam, "--task", "coco-box", "-d", world / "coco"]
    folders = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        ran = command(*arguments, "--workers", workers, "--batch-size", 1, "-o", folder, *CPU)
        assert ran.code == 0, ran.err
        folders.append(folder / edgetam.name / "coco-box-coco")

    assert parts(folders[0]) == parts(folders[1])


def test_a_run_with_other_settings_is_refused_by_their_names(command, ours, world, tmp_path):
    arguments = ["evaluate", "-m", ours, "--task", "coco-box", "-d", world / "coco", "-o", tmp_path]
    assert command(*arguments, *CPU, "--limit", 1).code == 0

    other = command(*arguments, *CPU, "--limit", 2, "--batch-size", 2)
    anew = command(*arguments, *CPU, "--limit", 2, "--batch-size", 2, "--restart")

    assert other.code == 2
    assert "batch_size: 8 then, 2 now" in other.err
    assert "records: 1 then, 2 now" in other.err
    assert "dtype" not in other.err
    assert anew.code == 0, anew.err


def test_other_weights_in_the_same_folder_are_other_settings(command, world, tmp_path, ours):
    model = tmp_path / "model"
    model.mkdir()
    for path in ours.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    arguments = ["evaluate", "-m", model, "--task", "coco-box", "-d", world / "coco"]
    arguments += ["-o", tmp_path / "out", "--limit", 1, *CPU]
    command(*arguments)
    (model / "model.safetensors").write_bytes((ours / "model.safetensors").read_bytes())

    ran = command(*arguments)

    assert ran.code == 2
    assert "weights: " in ran.err


def test_other_annotations_of_the_same_names_are_other_settings(command, world, tmp_path, ours):
    shutil.copytree(world / "coco", tmp_path / "coco")
    (annotations,) = (tmp_path / "coco").glob("annotations/*.json")
    arguments = ["evaluate", "-m", ours, "--task", "coco-box", "-d", tmp_path / "coco"]
    arguments += ["-o", tmp_path / "out", "--limit", 1, *CPU]
    assert command(*arguments).code == 0
    content = json.loads(annotations.read_text())
    content["annotations"][0]["bbox"][2] += 1
    annotations.write_text(json.dumps(content))

    ran = command(*arguments)

    assert ran.code == 2
    assert "contents of records: " in ran.err


def test_numbers_go_beside_the_weights_only_when_asked_for(command, world, tmp_path, ours):
    model = tmp_path / "model"
    model.mkdir()
    for path in ours.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    arguments = ["evaluate", "-m", model, "--task", "coco-box", "-d", world / "coco"]
    arguments += ["-o", tmp_path / "out", *CPU]
    command(*arguments)
    assert not (model / "evaluation_results.json").exists()

    command(*arguments, "--record", "--name", "little world")  # nothing is computed anew

    from efficientsam3_hf.hub.results import read_results

    (result,) = read_results(model)
    assert (result.metric, result.dataset, result.split) == ("mIoU", "little world", "val2017")
    assert result.command.startswith("efficientsam3 evaluate -m")


def test_a_picture_that_cannot_be_read_is_told(command, ours, world, tmp_path):
    data = tmp_path / "coco"
    shutil.copytree(world / "coco", data)
    broken = sorted(data.rglob("*.jpg"))[1]
    broken.write_bytes(b"no picture")

    ran = command(
        *("evaluate", "-m", ours, "--task", "coco-box", "-d", data, "-o", tmp_path / "out"),
        *("--json", *CPU),
    )

    assert ran.code == 0, ran.err
    assert ran.json[0]["skipped"] == ["COCO: 1"]
    assert "not counted, 1 of the records: COCO: 1" in ran.err


@pytest.mark.parametrize("task", ["coco-box", "detection", "speed"])
def test_pictures_of_which_none_can_be_read_are_no_result(task, command, ours, world, tmp_path):
    data = tmp_path / "coco"
    shutil.copytree(world / "coco", data)
    for path in data.rglob("*.jpg"):
        path.write_bytes(b"no picture")

    ran = command("evaluate", "-m", ours, "--task", task, "-d", data, "-o", tmp_path / "out", *CPU)

    assert ran.code == 2
    assert "None of the 4 records of COCO could be read" in ran.err
    assert not list(tmp_path.rglob("results.json"))


@pytest.mark.parametrize("task", ["coco-box", "detection"])
def test_without_annotations_nothing_is_scored(task, command, ours, world, tmp_path):
    data = tmp_path / "coco"
    shutil.copytree(world / "coco", data)
    (path,) = data.glob("annotations/*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))

    ran = command(
        *("evaluate", "-m", ours, "--task", task, "-d", data, "-o", tmp_path / "out", "--json"),
        *CPU,
    )

    assert ran.code == 0, ran.err
    assert ran.json[0]["measurements"] == []
    assert "Nothing was scored" in ran.err


def test_without_public_truth_there_are_predictions_and_no_numbers(command, ours, world, tmp_path):
    data = tmp_path / "davis"
    shutil.copytree(world / "davis2017", data)
    for path in data.glob("Annotations/480p/*/*.png"):
        if path.stem != "00000":
            path.unlink()

    ran = command(
        *("evaluate", "-m", ours, "--task", "vos", "-d", data, "-o", tmp_path / "out"),
        *("--json", *CPU),
    )

    assert ran.code == 0, ran.err
    assert ran.json[0]["measurements"] == []
    assert "Nothing was scored" in ran.err
    (predictions,) = ran.json[0]["predictions"]
    assert len(list(Path(predictions).glob("*/*.png"))) == 2 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--task or --suite"),
        (["--task", "coco-box"], "needs --data"),
        (["--task", "coco-box", "-d", "missing"], "There is no missing"),
        (["--task", "vos", "-d", "WORLD/coco"], "davis2017: ImageSets/2017/SPLIT.txt"),
        (["--task", "coco-box", "-d", "WORLD/coco", "--split", "test"], "with a split 'test'"),
        (["--task", "coco-box", "-d", "WORLD/coco", "--format", "saco"], "--format saco will not"),
        (["--task", "coco-box", "-d", "WORLD/coco", "--clicks", "3"], "no use for --clicks"),
        (["--task", "vos", "-d", "WORLD/davis2017", "--batch-size", "3"], "use for --batch-size"),
        (["--suite", "quick", "-d", "WORLD", "--format", "coco"], "--format and --images go with"),
        (["--task", "text", "-d", "WORLD/text"], "needs --teacher"),
        (["--task", "concept", "-d", "WORLD/saco", "--images", "WORLD/coco"], "by --images where"),
        (["--task", "chess", "-d", "WORLD/coco"], "'chess' is not one of"),
        (["--task", "speed", "-d", "WORLD/coco", "--device", "tpu9"], "no device of this machine"),
        (["--suite", "quick", "-d", "missing"], "There is no folder missing"),
    ],
)
def test_what_is_wrong_is_said(arguments, message, command, ours, world, tmp_path):
    arguments = [each.replace("WORLD", str(world)) for each in arguments]

    ran = command("evaluate", "-m", ours, "-o", tmp_path, *arguments)

    assert ran.code == 2
    assert message in " ".join(ran.err.replace("│", " ").split())
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("EMPTY", "holds no model"),
        ("MISSING", "is no folder, and not to be had from the Hub"),
        ("edgetam", "cannot do 'concepts'; it can do objects, tracks"),
        ("HALF", "lacks"),
    ],
)
def test_a_folder_that_will_not_do_is_said(model, message, command, sam3, edgetam, world, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    if model == "edgetam":
        folder = edgetam
    if model == "MISSING":
        folder = "mistyped"
    if model == "HALF":  # as transformers would load it, with random numbers and a warning
        from safetensors.torch import load_file, save_file

        for path in sam3.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        weights = load_file(sam3 / "model.safetensors")
        kept = {name: value for name, value in weights.items() if "dot_product" not in name}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    ran = command(
        *("evaluate", "-m", folder, "--task", "concept", "-d", world / "saco"),
        *("-o", tmp_path / "o"),
        *CPU,
    )

    assert ran.code == 2
    assert message in ran.err
