"""The shipped miniature: put into the package, measured again, shown in README and by the demo."""

import doctest
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from efficientsam3_hf import zoo
from efficientsam3_hf.data.video import open_video, read_picture
from efficientsam3_hf.distillation.ema import EMA_FILE
from efficientsam3_hf.distillation.family import Family
from examples import demo
from examples.miniature import media, plots, report, ship
from examples.miniature.measure import METRICS
from examples.miniature.state import load_run
from examples.miniature.students import BASE, MAIN, NO_DISTILLATION, ROUTE
from examples.miniature.teacher import new_teacher, with_tracker


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A student that has learned nothing."""
    return with_tracker(new_teacher()).save(tmp_path_factory.mktemp("student"))


def entry(number: float, flops: int = 20) -> dict:
    """Of `results.json`, about one model."""
    scores = {name: [number, number - 2.0, number + 4.0] for name in METRICS}
    return {"scores": scores, "cost": {"image": flops, "phrase": 10}, "minutes": 5.25}


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(ship, "score", lambda folder, split: dict.fromkeys(METRICS, 50.0))


# The regression test of the package: what was recorded when the student was shipped is reached.


@pytest.mark.slow
def test_the_shipped_student_is_as_good_as_recorded():
    recorded = report.read_results()["shipped"]
    assert ship.digest(zoo.embedded()) == recorded["sha256"], (
        "These are not the weights that were measured: `python -m examples.miniature.ship` "
        "measures what it puts there."
    )

    scores = ship.score(zoo.embedded(), "test")

    for name in ship.GOOD:
        least = recorded["scores"][name] - ship.NOISE
        assert scores[name] >= least, f"{name}: {scores[name]} after {recorded['scores'][name]}"
    assert scores["false positives"] <= recorded["scores"]["false positives"] + ship.NOISE


def test_the_shipped_student_is_the_reported_one():
    results = report.read_results()

    # Three standard deviations of a mean over 200 scenes: of 400 phrases that name something, of
    # which each is found or not, and of 250 things with an IoU that deviates by 0.15.
    for name, noise in (("cgF1", 6.0), ("box mIoU", 3.0)):
        reported = report.value(report.student_of(results), name)
        assert results["shipped"]["scores"][name] == pytest.approx(reported, abs=noise)


@pytest.mark.parametrize("path", report.BLOCKS, ids=lambda path: path.name)
def test_tables_are_those_of_the_results(path: Path):
    text = path.read_text(encoding="utf-8")

    assert text == report.with_tables(path, report.read_results()), (
        f"{path.name} is stale: run `python -m examples.miniature.report`."
    )


def test_a_student_is_put_into_the_package(student, tmp_path, quick):
    results = tmp_path / "results.json"
    results.write_text(
        json.dumps(
            {"teacher": entry(80.0), "stages": dict.fromkeys(ROUTE, entry(75.0)), "seeds": [1]}
        )
    )
    target = tmp_path / "package" / "efficientsam3-miniature"
    target.mkdir(parents=True)
    (target / "config.json").write_text("goes")
    (target / "old.txt").write_text("goes")

    ship.ship(student, target, results)

    assert {path.name for path in target.iterdir()} == {*ship.KEPT, "README.md"}
    record = json.loads(results.read_text())
    assert record["seeds"] == [1]
    assert record["shipped"]["scores"]["cgF1"] == 50.0
    assert record["shipped"]["sha256"] == ship.digest(target)
    assert "| teacher | 80.0 |" in (target / "README.md").read_text()
    stored = load_file(target / ship.WEIGHTS_FILE)
    assert {each.dtype for each in stored.values() if each.is_floating_point()} == {torch.float16}
    shipped, before = Family.load(target), Family.load(student)
    for name, weight in before.state_dict().items():
        assert shipped.state_dict()[name].dtype == weight.dtype
        torch.testing.assert_close(shipped.state_dict()[name], weight, atol=1e-3, rtol=1e-3)


def test_a_student_that_is_too_large_is_refused_and_leaves_what_was_there(
    student, tmp_path, quick, monkeypatch
):
    monkeypatch.setattr(ship, "MOST_BYTES", 4_000_000)
    target = tmp_path / "efficientsam3-miniature"
    target.mkdir()
    (target / "config.json").write_text("stays")

    with pytest.raises(ValueError, match=r"4\.\d\d MB are more than the 4 MB"):
        ship.ship(student, target, tmp_path / "results.json")

    assert [path.name for path in tmp_path.iterdir()] == ["efficientsam3-miniature"]
    assert (target / "config.json").read_text() == "stays"
    assert [path.name for path in target.iterdir()] == ["config.json"]


def test_half_precision_that_costs_points_is_refused(student, tmp_path, monkeypatch):
    scores = iter([dict.fromkeys(METRICS, 50.0), {**dict.fromkeys(METRICS, 50.0), "J&F": 48.9}])
    monkeypatch.setattr(ship, "score", lambda folder, split: next(scores))

    with pytest.raises(ValueError, match="Half precision costs too much"):
        ship.ship(student, tmp_path / "target", tmp_path / "results.json")

    assert not list(tmp_path.iterdir())


def test_what_cannot_track_is_not_shipped(tmp_path):
    Family(new_teacher()).save(tmp_path / "detector")

    with pytest.raises(ValueError, match="no tracker for video"):
        ship.load_video(tmp_path / "detector")
    with pytest.raises(FileNotFoundError, match="neither a model nor a checkpoint"):
        ship.load_video(tmp_path)


def test_a_teacher_is_written_in_half_precision(student, tmp_path):
    folder = ship.ship_teacher(student, tmp_path / "teacher")

    assert {path.name for path in folder.iterdir()} == set(ship.KEPT)
    before, after = Family.load(student).state_dict(), Family.load(folder).state_dict()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-3, rtol=1e-3)


def test_the_teacher_that_comes_with_the_repository_stays_the_same_when_written_again(tmp_path):
    """So stages and results of it are of the teacher wherever it was copied to."""
    teacher = ship.WEIGHTS / "teacher"

    written = ship.write_half(ship.load_video(teacher), tmp_path / "teacher")

    assert ship.digest(written) == ship.digest(teacher)


def test_stages_are_written_for_those_who_go_on_from_there(student, tmp_path):
    root = tmp_path / "root"
    image, text, *_ = MAIN.folders(root).values()
    for folder in (image, text):
        shutil.copytree(student, folder)
    (image / "done.json").write_text('{"teacher": "x", "minutes": 1.0}')

    (written,) = ship.ship_stages(root, tmp_path / "weights")  # the other is not done

    assert written.relative_to(tmp_path / "weights") == image.relative_to(root)
    assert {path.name for path in written.iterdir()} == {*ship.KEPT, "done.json"}
    assert (written / "done.json").read_text() == (image / "done.json").read_text()


def test_averaged_weights_are_what_is_shipped(student, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-3"
    family = Family.load(student)
    family.save(checkpoint)
    (checkpoint / "trainer_state.json").write_text("{}")
    name, weight = next(iter(family.named_parameters()))
    ship.save_file({name: torch.full_like(weight, 7.0)}, checkpoint / EMA_FILE)

    taken = load_run(tmp_path / "run").state_dict()

    assert (taken[name] == 7).all()
    other = "detector.detr_encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(taken[other], family.state_dict()[other])


def test_scores_are_those_of_the_weights(student):
    scores = ship.score(student, "val", (2, 1))

    assert scores.keys() == set(METRICS)
    assert scores["cgF1"] < 20  # it has learned nothing
    assert 0 < scores["box mIoU"] < 80


def test_what_was_measured_is_published_and_the_rest_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results.json")
    old = {"teacher": {"weights": "a"}, "seeds": {"0": 1, "1": 2}, "shipped": 1}
    old["teacher"]["minutes"] = 5.0
    report.RESULTS.write_text(json.dumps(old))
    folder = tmp_path / "miniature"
    folder.mkdir()
    empty = {"stages": {}, "ablation_seeds": {}}
    new = {"teacher": {"weights": "a", "minutes": None}, "ablations": {"x": 5}, **empty}
    new["seeds"] = {"1": 3, "2": 4}
    (folder / "results.json").write_text(json.dumps(new))

    report.publish(folder)

    both = {**new, "seeds": {"0": 1, "1": 3, "2": 4}, "shipped": 1, "teacher": old["teacher"]}
    assert json.loads(report.RESULTS.read_text()) == both
    new["teacher"]["weights"] = "b"  # of which nothing else was measured yet
    (folder / "results.json").write_text(json.dumps(new))
    report.publish(folder)
    assert json.loads(report.RESULTS.read_text()) == {**new, "shipped": 1}
    with pytest.raises(FileNotFoundError, match="Nothing was measured"):
        report.publish(tmp_path / "nowhere")


def test_a_text_without_a_block_for_the_table_is_an_error():
    with pytest.raises(ValueError, match="no block between <!-- miniature -->"):
        report.with_table("# Title", "miniature", "| |")


def test_tables_and_plots_say_what_was_measured(tmp_path):
    stages = {stage: entry(70.0 + place, 20) for place, stage in enumerate(ROUTE)}
    results = {
        "teacher": entry(80.0, 200),
        "stages": stages,
        "seeds": {str(seed): entry(74.0 - seed) for seed in range(3)},
        "ablations": {BASE.title: entry(60.0), NO_DISTILLATION: entry(40.0), "old": entry(1.0)},
        "ablation_seeds": {str(seed): entry(60.0 + 2 * seed) for seed in range(3)},
    }

    assert "| image | 5.2 | 70.0 ± 3.0 |" in report.stages(results)
    aims = report.aims(results)
    assert "| student after all stages, share of the teacher's cgF1 | ≥ 95 | 92.5 |" in aims
    assert "| FLOPs of trunk and necks, share of the teacher's | ≤ 20 | 10.0 |" in aims
    assert "| FLOPs with four phrases, share of the teacher's | | 25.0 |" in aims
    assert f"cgF1 above that of “{NO_DISTILLATION}” | > 2.0 | 22.0 |" in aims
    assert "| cgF1 | 74.0 | 73.0 | 72.0 | 73.0 | 1.0 |" in report.seeds(results)
    rows = report.ablations(results)
    assert rows.index(f"| {BASE.title} | 60.0 ± 3.0 |") < rows.index(f"| {NO_DISTILLATION} | 40.0")
    assert "old" not in rows
    plots.draw_stages(results, tmp_path / "stages.png")
    plots.draw_ablations(results, tmp_path / "ablations.png")
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(10_000_000) or []) > 5


def test_examples_in_docstrings_are_true():
    result = doctest.testmod(report)

    assert result.attempted > 0
    assert result.failed == 0


def test_picture_and_clip_are_those_of_the_world(tmp_path):
    media.write_media(tmp_path)

    # As good as equal: other versions of the codecs round differently.
    for path in (media.SCENE, media.CLIP):
        assert (media.MEDIA / path).stat().st_size < 200_000
    made, kept = (read_picture(each / media.SCENE) for each in (tmp_path, media.MEDIA))
    assert np.abs(made.astype(int) - kept).mean() < 2
    made, kept = (list(open_video(each / media.CLIP)) for each in (tmp_path, media.MEDIA))
    assert len(made) == len(kept) == media.FRAMES
    for one, other in zip(made, kept, strict=True):
        assert np.abs(one.pixels.astype(int) - other.pixels).mean() < 4


@pytest.mark.slow
def test_the_demo_writes_its_pictures_and_says_where(tmp_path, capsys):
    demo.main(["--output", str(tmp_path)])

    said = capsys.readouterr().out
    assert 'phrase "red star"' in said
    assert f"The files are in {tmp_path}" in said
    names = {f"scene_{number}.png" for number in range(1, 5)} | {"clip.gif", "overview.jpg"}
    assert {path.name for path in tmp_path.iterdir()} == names
    with Image.open(tmp_path / "clip.gif") as clip:
        assert clip.n_frames == media.FRAMES


@pytest.mark.slow
def test_what_the_demo_shows_is_right(tmp_path):
    with Image.open(media.MEDIA / media.SCENE) as file:
        image = file.convert("RGB")
    two_stars, like_one = demo.find_concepts(zoo.embedded(), image)
    boxed, clicked = demo.find_objects(zoo.embedded(), image)

    # Where things are in the picture: (x, y) of a pixel in the middle of each.
    star, other_star, yellow, square = (52, 127), (427, 285), (247, 367), (67, 292)
    assert covered(two_stars.masks, (star, other_star, yellow, square)) == [1, 1, 0, 0]
    assert covered(like_one.masks, (star, other_star, square)) == [1, 1, 0]
    assert covered(boxed.masks, (square, yellow)) == [1, 0]
    assert covered(clicked.masks, (yellow, star, other_star)) == [1, 0, 0]
    count, _ = demo.follow_phrase(zoo.embedded(), media.MEDIA / media.CLIP, tmp_path / "clip.gif")
    assert count == 2


def covered(masks: np.ndarray, places) -> list[int]:
    """By how many masks each place (x, y) is covered."""
    return [int(masks[:, y, x].sum()) for x, y in places]
