"""`efficientsam3 distill`: from a folder of pictures to a student, killed and gone on."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distillation.folder_worlds import ABSENT, CONFIDENCE, PHRASES, write_world
from PIL import Image
from safetensors.torch import load_file
from transformers.utils import logging

from efficientsam3_hf import EfficientSam3Model, EfficientSam3Processor
from efficientsam3_hf.cli.app import main
from efficientsam3_hf.distillation import calibration
from efficientsam3_hf.distillation.family import Family
from efficientsam3_hf.distillation.folder_stages import RECIPES
from efficientsam3_hf.hub.results import read_results, read_training

OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
STAGES = ["stage1_image", "stage1_text", "stage3_concepts"]


@pytest.fixture(scope="module")
def folder_world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("folder-world"))


def arguments(world: Path, output: Path, student: str = "own_text") -> list[Any]:
    """A command that takes seconds: four steps of each stage, checkpoints in the last one."""
    words: list[Any] = ["distill", "--images", world / "photos"]
    words += ["--phrases", world / "phrases.txt"]
    words += ["--student", world / student, "--teacher", world / "teacher", "--output", output]
    words += ["--random-trunk", "--steps", 4, "--held-out", 0.3, "--device", "cpu", "--json"]
    words += ["--confidence", CONFIDENCE, "--absent", ABSENT, "--cache", "yes", "--yes"]
    return [*words, "--set", "stage3_concepts.training.save_steps=2"]


@pytest.fixture(scope="module")
def ran(folder_world, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The student of a run from beginning to end, and what the command said."""
    output = tmp_path_factory.mktemp("ran") / "student"
    words = ["efficientsam3", *map(str, arguments(folder_world, output))]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(logging, "disable_progress_bar", lambda: None)
        patch.setattr(logging, "set_verbosity_error", lambda: None)
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as left:
            main()
    assert not left.value.code
    return output, json.loads(said.getvalue())


def start(code: str, *words: object) -> subprocess.CompletedProcess:
    """Run the command line in another process, in which some code may do harm first."""
    imports = "import os, signal, sys\nfrom efficientsam3_hf.cli.app import main\n"
    begin = "sys.argv = ['efficientsam3', *sys.argv[1:]]\n"
    return subprocess.run(
        [sys.executable, "-c", imports + begin + code, *map(str, words)],
        env=OFFLINE,
        capture_output=True,
        text=True,
    )


def files_below(folder: Path) -> dict[str, int]:
    """When each file was last changed."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in paths}


def pairs_of(output: Path, part: str) -> list[dict[str, Any]]:
    """Pairs of picture and phrase in a part of the labels."""
    return json.loads((output / f"work/labels/{part}.json").read_text())["images"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_a_folder_of_pictures_becomes_a_student(ran, folder_world):
    output, said = ran
    work = output / "work"

    plan, result = said["plan"], said["result"]
    assert plan["pictures"] == 13
    assert plan["pairs"] == 13 * len(PHRASES)
    assert plan["training"] + plan["validation"] + plan["test"] == 13
    assert [stage["name"] for stage in plan["stages"]] == STAGES
    assert [stage["uses_cache"] for stage in plan["stages"]] == [True, False, True]
    assert all(stage["seconds"] > 0 for stage in plan["stages"])
    assert plan["label_seconds"] > 0
    assert plan["cache_bytes"] > 0
    assert "learns the 5 phrases that it is given and no others" in plan["remarks"][0]

    parts = result["labels"]
    broken = [name for part in parts.values() for name in part["broken"]]
    assert broken == ["broken.jpg"]
    names = {part: {pair["file_name"] for pair in pairs_of(output, part)} for part in parts}
    assert sum(map(len, names.values())) == len(set().union(*names.values()))
    for part, counts in parts.items():
        assert counts["present"], part
        assert counts["absent"], part

    assert result["stages"] == dict.fromkeys(STAGES, 4)
    records = read_training(output)
    assert [record.stage for record in records] == [
        "stage 1: images",
        "stage 1: text",
        "stage 3: concepts",
    ]
    assert [record.steps for record in records] == [4, 4, 4]
    assert {record.teacher for record in records} == {"teacher"}
    assert records[0].initial_weights == {"student": "teacher", "text tower": "random"}
    assert {each.metric for each in read_results(output)} == {"cgF1", "IL_MCC", "pmF1"}
    assert {each["dataset"] for each in result["measurements"]} == {
        "photos, with labels of teacher as truth"
    }
    card = (output / "README.md").read_text()
    assert "photos, with labels of teacher as truth, held-out split" in card
    assert "phrases of phrases.txt" in card
    assert "\ndatasets:" not in card  # one's own are none of the Hub
    assert (output / "LICENSE").is_file()
    for text in (card, json.dumps(json.loads((output / "training_record.json").read_text()))):
        assert str(folder_world) not in text
    assert not list(work.glob("*/checkpoint-*"))


@pytest.mark.slow
def test_what_is_written_is_the_last_stage_and_answers(ran, folder_world):
    output, _ = ran
    model = EfficientSam3Model.from_pretrained(output).eval()
    processor = EfficientSam3Processor.from_pretrained(output)
    picture = Image.open(folder_world / "photos/0/0.png")

    with torch.no_grad():
        outputs = model(**processor(images=picture, text="dog", return_tensors="pt"))

    assert outputs.pred_masks.isfinite().all()
    assert Family.load(output).has_video
    last = weights(output / "work/stage3_concepts")
    assert all(torch.equal(tensor, last[name]) for name, tensor in weights(output).items())
    before = weights(output / "work/stage1_image")
    for part, moved in (("text_encoder", True), ("vision_encoder.backbone", False)):
        after = weights(output / "work/stage1_text")
        names = [name for name in before if name.startswith(f"detector_model.{part}.")]
        assert names
        assert any(not torch.equal(before[n], after[n]) for n in names) == moved


# Two runs in one program, which share its imports: the first one dies in the middle of the labels,
# the second one after a checkpoint of the last stage.
DIES_TWICE = """
import json
from pathlib import Path
from efficientsam3_hf.distillation.stage3_concepts import ConceptTrainer
from efficientsam3_hf.distillation.teacher_labels import LabelFolder

def die_in(owner, name, is_time):
    method = getattr(owner, name)
    def dies(self, *arguments, **options):
        if is_time(self):
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *arguments, **options)
    setattr(owner, name, dies)

folder = Path(sys.argv[sys.argv.index("--output") + 1], "work/labels/pictures")
labels = lambda: {path.name: path.stat().st_mtime_ns for path in folder.glob("*")}
if (first := os.fork()) == 0:
    die_in(LabelFolder, "label", lambda self: len(labels()) == 5)
    main()
_, status = os.waitpid(first, 0)
print(json.dumps([os.WTERMSIG(status), labels()]), flush=True)
die_in(ConceptTrainer, "training_step", lambda self: self.state.global_step == 3)
main()
"""


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_been(ran, folder_world, command, tmp_path):
    whole, _ = ran
    killed = tmp_path / "student"
    words = arguments(folder_world, killed)

    died = start(DIES_TWICE, *words)
    done = {stage: files_below(killed / "work" / stage) for stage in STAGES[:2]}
    last = command(*words)

    assert died.returncode == -signal.SIGKILL, died.stderr
    first, labels = json.loads(died.stdout)
    assert first == signal.SIGKILL
    assert len(labels) == 5
    after = files_below(killed / "work/labels/pictures")
    assert len(after) == 13
    assert all(after[name] == when for name, when in labels.items())
    assert last.code == 0, last.err
    assert [stage["is_done"] for stage in last.json["plan"]["stages"]] == [True, True, False]
    for stage in STAGES[:2]:
        assert files_below(killed / "work" / stage) == done[stage]
    for part in ("train", "validation", "test"):
        assert pairs_of(whole, part) == pairs_of(killed, part)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(killed)[name], tensor, rtol=0, atol=1e-6)
    configs = [EfficientSam3Model.from_pretrained(each).config for each in (whole, killed)]
    assert configs[0].score_bias == pytest.approx(configs[1].score_bias, abs=1e-4)


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_not_under_other_settings(ran, folder_world, command):
    output, said = ran
    words = arguments(folder_world, output)
    before = files_below(output)

    again = command(*words)
    other = command(*words, "--set", "stage3_concepts.training.learning_rate=0.5")
    unsure = command(*words, "--confidence", 0.3)

    assert again.code == 0, again.err
    assert again.json["result"] == said["result"]
    assert again.json["plan"]["seconds"] == 0
    assert other.code == unsure.code == 2
    assert "stage3_concepts was begun with other settings" in other.err
    assert "training.learning_rate: 'default' then, '0.5' now" in other.err
    assert "max_steps" not in other.err
    assert "labels was begun with other settings:\n  confidence: 0.217 then, 0.3 now" in unsure.err
    changed = {n for n, when in files_below(output).items() if before.get(n) != when}
    assert all(name.startswith("work/") for name in changed)
    assert not any(name.endswith(".safetensors") for name in changed)


@pytest.mark.slow
def test_prompts_and_a_text_tower_of_the_teacher(folder_world, command, tmp_path, monkeypatch):
    # Random weights are right of nothing: call every second detection right.
    monkeypatch.setattr(calibration, "rightness", lambda masks, *_: np.arange(len(masks)) % 2 == 0)
    words = arguments(folder_world, tmp_path / "student", "teachers_text")
    del words[words.index("--json")]

    ran = command(*words, "--steps", 1, "--prompts", "--cache", "no")

    assert ran.code == 0, ran.err
    records = [record.stage for record in read_training(tmp_path / "student")]
    assert records == ["stage 1: images", "stage 1+: prompts", "stage 3: concepts"]
    assert "say how near it is to the teacher" in ran.out
    assert "Not read (1):\n  broken.jpg: ValueError: a picture, of 10 bytes, is in" in ran.out
    assert "Calibrated: of phrases that name nothing" in ran.out
    assert not (tmp_path / "student/work/cache").exists()
    config = EfficientSam3Model.from_pretrained(tmp_path / "student").config
    assert (config.score_temperature, config.score_bias) != (1.0, 0.0)


@pytest.mark.slow
def test_a_dry_run_writes_nothing(folder_world, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files_below(folder_world)
    words = arguments(folder_world, tmp_path / "student")

    ran = command(*words, "--dry-run")

    assert ran.code == 0, ran.err
    assert ran.json["result"] is None
    assert ran.json["plan"]["seconds"] > 0
    assert ran.json["plan"]["free_bytes"] > 0
    assert "Plan: about" in ran.err
    assert list(tmp_path.iterdir()) == []
    assert files_below(folder_world) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--epochs", 2], "--steps and --epochs say the same"),
        (["--held-out", 1], "--held-out 1.0 must lie between 0 and 1"),
        (["--absent", 0.6], "--absent 0.6 must not be more than --confidence"),
        (["--cache", "perhaps"], "Invalid value for '--cache'"),
        (["--set", "stage1_image.max_steps=5"], "is not STAGE.SECTION.FIELD=VALUE"),
        (["--set", "stage2_memory.training.max_steps=5"], "--set stage2_memory: stages are"),
        (["--images", "nowhere"], "--images nowhere is no folder"),
        (["--phrases", "nowhere.txt"], "--phrases nowhere.txt is no file"),
        (["--student", "efficientsam3-tinyvit-xs"], "no variant 'efficientsam3-tinyvit-xs'"),
        (["--images", "empty"], "empty has 0 pictures"),
        (["--phrases", "empty.txt"], "empty.txt holds no phrases"),
        (["--output", "full"], "--output full holds something else (thesis.tex)"),
        (["--output", "photos/student"], "--output lies within --images"),
    ],
)
def test_what_cannot_be_meant_is_said_at_once(
    changes, message, folder_world, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full/thesis.tex").write_text("years of work")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "photos").symlink_to(folder_world / "photos")
    words = arguments(folder_world, tmp_path / "student")

    ran = command(*words, *changes)

    assert ran.code == 2
    assert " ".join(message.split()) in " ".join(ran.err.replace("│", " ").split())
    assert (tmp_path / "full/thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "student").exists()


def test_nothing_starts_without_a_yes(folder_world, command, tmp_path, monkeypatch):
    words = arguments(folder_world, tmp_path / "student")
    del words[words.index("--yes")]
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)

    ran = command(*words)

    assert ran.code == 2
    assert "nobody is there to ask" in ran.err
    assert not (tmp_path / "student").exists()


def test_there_is_a_recipe_for_each_stage_that_is_run():
    assert [stage for stage in RECIPES if stage != "stage1_prompts"] == STAGES
