"""The miniature after its teacher: data on disk, students through all stages, their numbers."""

import json
from pathlib import Path

import pytest
import torch

from efficientsam3_hf.data.loading import load
from efficientsam3_hf.data.phrases import PhraseList
from efficientsam3_hf.data.saco import SacoImages
from efficientsam3_hf.distillation.family import Family, new_student
from examples.miniature import report, results
from examples.miniature.datasets import phrases, write_world
from examples.miniature.measure import METRICS, cost, measure
from examples.miniature.student import student_config
from examples.miniature.students import (
    ABLATIONS,
    BASE,
    BASES,
    FROM_NOTHING,
    MAIN,
    ROUTE,
    SEEDS,
    Change,
    Student,
    check_teacher,
    train,
)
from examples.miniature.teacher import new_teacher, with_tracker
from examples.miniature.world import SIDE, WORDS, scenes

SIZES = {"train": (8, 2), "val": (4, 2), "test": (4, 1)}
FEW = {
    "training.max_steps": "1",
    "training.use_cpu": "true",
    "training.dataloader_num_workers": "0",
    "training.disable_tqdm": "true",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature with a teacher that has learned nothing, and a world of a few pictures."""
    root = tmp_path_factory.mktemp("miniature")
    with_tracker(new_teacher()).save(root / "teacher")
    write_world(root / "data", SIZES)
    return root


def test_the_world_on_disk_is_that_of_the_scenes(root: Path):
    folder = root / "data" / "val" / "images"
    file = folder / "gold_synthetic_merged_a_release_val.json"
    read = load(SacoImages(str(file), str(folder / "images")))
    drawn = scenes(SIZES["val"][0], "val")

    for one, other in zip(read, (drawn[index] for index in range(len(drawn))), strict=True):
        assert [query.phrase for query in one.queries] == [query.phrase for query in other.queries]
        for seen, true in zip(one.queries, other.queries, strict=True):
            assert [each.rle for each in seen.instances] == [each.rle for each in true.instances]


def test_parts_of_the_world_are_written_once(root: Path):
    file = root / "data" / "val" / "images" / "gold_synthetic_merged_a_release_val.json"
    before = file.stat().st_mtime_ns

    write_world(root / "data", {**SIZES, "val": (5, 2)})

    assert file.stat().st_mtime_ns == before
    assert not list((root / "data").glob(".*"))


def test_phrases_are_all_that_the_scenes_say(root: Path):
    listed = {sample.text for sample in load(PhraseList(str(root / "data" / "phrases.txt")))}
    drawn = scenes(300, "train")
    said = {query.phrase for index in range(300) for query in drawn[index].queries}

    assert said == set(phrases())
    assert listed == {*said, "visual"}
    assert {word for phrase in listed for word in phrase.split()} == set(WORDS)


def test_image_path_of_the_student_is_a_fifth_of_the_teachers(root: Path, tmp_path: Path):
    """Trunk and both necks: what is computed of each picture whatever is asked."""
    new_student(Family.load(root / "teacher"), student_config()).save(tmp_path)
    small, large = cost(tmp_path), cost(root / "teacher")

    assert small["image"] <= large["image"] / 5
    assert small["parameters"] * 2 <= 8e6  # bytes that may be shipped, in half precision


def test_students_share_the_stages_that_they_have_in_common():
    rows = (*SEEDS, *BASES[1:], *ABLATIONS)
    assert len({row.last(Path("m")) for row in rows}) == len(rows)
    assert (SEEDS[0], BASES[0], ABLATIONS[0]) == (MAIN, BASE, BASE)
    main, base = (row.folders(Path("m")) for row in (MAIN, BASE))
    assert list(main) == list(ROUTE)
    assert not set(main.values()) & set(base.values())
    for row in ABLATIONS[1:]:
        folders = row.folders(Path("m"))
        common = [stage for stage in ROUTE if base.get(stage) == folders.get(stage)]
        if row.route == MAIN.route and row.neck == MAIN.neck:
            first = next(iter(row.changes), "memory")
            assert common == list(ROUTE)[: list(ROUTE).index(first)]
    changed = Student("", changes={"image": Change("x", {})}).folders(Path("m"))
    assert not set(changed.values()) & set(main.values())


@pytest.mark.slow
def test_a_student_goes_through_all_stages_and_is_measured(root: Path, monkeypatch):
    train(MAIN, root, FEW)
    stamps = {folder: (folder / "done.json").read_text() for folder in MAIN.folders(root).values()}
    train(MAIN, root, FEW)  # nothing is left to do

    for folder, stamp in stamps.items():
        assert (folder / "done.json").read_text() == stamp
        assert Family.load(folder).has_video

    dense = next(row for row in ABLATIONS if row.memory == "dense")
    train(dense, root, FEW)
    shared = Family.load(MAIN.folders(root)["prompts"]).state_dict()
    before = Family.load(dense.new(root) / "image.text.prompts-dense")
    assert before.tracker.config.memory == "dense"
    for name, weight in before.state_dict().items():
        if "vision_encoder" in name:
            assert torch.equal(weight, shared[name])
    assert Family.load(dense.last(root)).tracker.config.memory == "dense"

    monkeypatch.setattr(results, "measure", lambda *args, **more: measure(*args, limit=1, draws=2))
    file = results.write_results(root)
    written = json.loads(file.read_text())
    assert list(written["stages"]) == list(ROUTE)
    student = report.student_of(written)
    assert set(student["scores"]) == set(METRICS)
    assert student["cost"]["image"] < written["teacher"]["cost"]["image"]


@pytest.mark.slow
def test_a_student_of_the_truth_alone_learns_all_that_it_has(root: Path):
    alone = ABLATIONS[0]
    train(alone, root, FEW)

    learned = Family.load(alone.last(root)).state_dict()
    fresh = new_student(Family.load(root / "teacher"), student_config()).state_dict()
    norms = [name for name in fresh if name.endswith("running_mean")]
    assert norms
    for name in norms:  # zero in one that has seen nothing
        assert learned[name].abs().max() > 0, name
    trained = Family.load(alone.last(root)).set_trainable(FROM_NOTHING["training.trained_parts"])
    assert any(name.startswith("detector.text_encoder.") for name in trained)


def test_ablations_take_as_many_steps_as_what_they_are_compared_with():
    def steps(row: Student) -> int:
        changed = {stage: change.flags for stage, change in row.changes.items()}
        return sum(
            int(changed.get(stage, {}).get("training.max_steps", row.steps(stage)))
            for stage in row.route
        )

    assert 4 * steps(BASE) == steps(MAIN)
    assert steps(ABLATIONS[1]) == steps(BASE)
    for row in ABLATIONS:
        assert steps(row) <= steps(BASE), row.title


def test_a_stage_of_another_teacher_is_refused(tmp_path: Path):
    (tmp_path / "done.json").write_text('{"minutes": 1.0, "teacher": "other"}')

    with pytest.raises(ValueError, match="distilled from another teacher"):
        check_teacher(tmp_path, "this")


def test_images_of_the_student_are_as_its_configuration_says():
    config = student_config("sam3", "dense")

    assert config.image_size == config.tracker_video_config.image_size == 128 != SIDE
    assert config.tracker_video_config.memory == "dense"
    assert config.vision_config.neck == "sam3"
