"""What is written for official evaluators scores, there, to the numbers that the command reports.

The answers are the truth with errors of a known kind, so that numbers lie between 0 and 1.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from efficientsam3_hf.benchmarks import image_tasks, tasks, video_tasks
from efficientsam3_hf.benchmarks.images import Instances
from efficientsam3_hf.benchmarks.running import Result, Run, run_task
from efficientsam3_hf.benchmarks.subsets import Subset, find_subsets
from efficientsam3_hf.data.masks_rle import decode_rle
from efficientsam3_hf.data.synthetic_writer import write_synthetic
from efficientsam3_hf.evaluation import concept, units, video_concept, video_objects

SIDE = 96


def shifted(mask: np.ndarray, by: int) -> np.ndarray:
    """A mask a few pixels beside its place."""
    return np.roll(mask, by, axis=1)


def answers(samples: Any) -> Any:
    """A stand-in for `find_concepts`: most instances, some beside their place, some made up."""
    truth = {
        sample.image.tobytes(): {query.phrase: query.instances for query in sample.queries}
        for sample in samples
    }

    def find_concepts(loaded, images, phrases, threshold=0.5, most=None):
        found = []
        for image, of_image in zip(images, phrases, strict=True):
            generator = np.random.default_rng(int(image.sum()))
            of_phrases = []
            for phrase in of_image:
                masks = [each.mask for each in truth[image.tobytes()][phrase]]
                masks = [shifted(each, int(generator.integers(0, 4))) for each in masks]
                masks = [each for each in masks if generator.random() < 0.8]
                if generator.random() < 0.4:
                    masks.append(
                        shifted(np.eye(SIDE, dtype=bool) | np.eye(SIDE, k=1, dtype=bool), 5)
                    )
                scores = generator.uniform(0.5, 1.0, len(masks))
                stacked = np.array(masks).reshape(-1, SIDE, SIDE)
                of_phrases.append(Instances(stacked, scores, np.zeros((len(masks), 4))))
            found.append(of_phrases)
        return found

    return find_concepts


class NoModel:
    """Stands where a model would."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a task without a model."""
    monkeypatch.setattr(tasks, "load", lambda *arguments: NoModel())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "none"}')

    def start(task: tasks.Task, subsets: list[Subset]) -> Result:
        opened = [subset.open(None) for subset in subsets]
        run = Run(str(tmp_path / "model"), tmp_path / "out", draws=10, command="the command")
        result = run_task(task, opened, run)
        assert result is not None
        return result

    return start


def by_metric(result: Result) -> dict[str, float]:
    return {each.metric: each.value / 100 for each in result.measurements}


def test_concepts_score_in_the_official_form_to_the_reported_numbers(run, tmp_path, monkeypatch):
    write_synthetic(tmp_path / "gold", "saco", "test", count=8, side=SIDE)
    annotations = tmp_path / "gold" / "gold_synthetic_merged_a_release_test.json"
    other = json.loads(annotations.read_text())  # an annotator who missed some and doubts a pair
    other["annotations"] = other["annotations"][::2]
    other["images"][3]["is_instance_exhaustive"] = 0
    annotations.with_name(annotations.name.replace("_a_", "_b_")).write_text(json.dumps(other))
    (subset,) = find_subsets(tmp_path / "gold", ["saco"])
    monkeypatch.setattr(image_tasks, "find_concepts", answers(subset.open(None).samples))

    result = run(image_tasks.ConceptTask(batch_size=3), [subset])

    predictions = json.loads(result.predictions[0].read_text())
    truths = [json.loads(path.read_text()) for path in subset.truth]
    expected = concept.summarize(concept.score_files(truths, predictions))
    found = by_metric(result)
    assert len(truths) == 2
    assert 0.05 < expected["cgF1"] < 0.95
    for name in ("cgF1", "IL_MCC", "pmF1", "positive_macro_F1", "F1"):
        assert found[name] == pytest.approx(expected[name], abs=1e-12)
    assert result.measurements[0].units == 8 * 4 - 1  # pairs, less the one in doubt


def test_annotators_of_other_pairs_are_an_error(run, tmp_path, monkeypatch):
    write_synthetic(tmp_path / "gold", "saco", "test", count=2, side=SIDE)
    annotations = tmp_path / "gold" / "gold_synthetic_merged_a_release_test.json"
    other = json.loads(annotations.read_text())
    gone = other["images"].pop()["id"]
    other["annotations"] = [each for each in other["annotations"] if each["image_id"] != gone]
    annotations.with_name(annotations.name.replace("_a_", "_b_")).write_text(json.dumps(other))
    (subset,) = find_subsets(tmp_path / "gold", ["saco"])
    monkeypatch.setattr(image_tasks, "find_concepts", answers(subset.open(None).samples))

    with pytest.raises(ValueError, match=r"_b_release_test\.json has other pairs"):
        run(image_tasks.ConceptTask(), [subset])


def test_subsets_are_averaged_unweighted(run, tmp_path, monkeypatch):
    for name, count in (("one", 3), ("two", 6)):
        write_synthetic(tmp_path / "gold", "saco", "test", count=count, side=SIDE)
        path = tmp_path / "gold" / "gold_synthetic_merged_a_release_test.json"
        path.rename(path.with_name(f"gold_{name}_merged_a_release_test.json"))
    subsets = find_subsets(tmp_path / "gold", ["saco"])
    monkeypatch.setattr(image_tasks, "find_concepts", answers(subsets[1].open(None).samples))

    result = run(image_tasks.ConceptTask(), subsets)

    values = {each.dataset: each.value for each in result.measurements if each.metric == "cgF1"}
    one, two, mean = values.values()
    assert list(values) == ["SA-Co/Gold one", "SA-Co/Gold two", "SA-Co/Gold"]
    assert one != two
    assert mean == pytest.approx((one + two) / 2)
    assert [each.dataset for each in result.headline] == ["SA-Co/Gold"] * 3
    assert (result.folder / "units-one.npz").is_file()


def test_detections_score_by_pycocotools_to_the_reported_numbers(run, tmp_path, monkeypatch):
    write_synthetic(tmp_path / "coco", "coco", "val", count=8, side=SIDE)
    (subset,) = find_subsets(tmp_path / "coco", ["coco"])
    monkeypatch.setattr(image_tasks, "find_concepts", answers(subset.open(None).samples))

    result = run(image_tasks.DetectionTask(batch_size=3), [subset])

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(subset.truth[0]))
        official = COCOeval(truth, truth.loadRes(str(result.predictions[0])), "segm")
        official.evaluate()
        official.accumulate()
        official.summarize()
    found = by_metric(result)
    assert 0.05 < official.stats[0] < 0.95
    for name, place in (("AP", 0), ("AP50", 1), ("AP75", 2), ("AR@100", 8)):
        assert found[name] == pytest.approx(official.stats[place], abs=1e-9)


def test_boxes_write_one_mask_for_each_object(run, tmp_path, monkeypatch):
    write_synthetic(tmp_path / "coco", "coco", "val", count=3, side=SIDE)
    (subset,) = find_subsets(tmp_path / "coco", ["coco"])
    truth = {
        tuple(instance.box_xyxy): instance.mask
        for sample in subset.open(None).samples
        for _, instance in image_tasks.objects_of(sample)
    }

    class Answers:
        @classmethod
        def of(cls, loaded, images):
            return cls()

        def by_boxes(self, index, boxes):
            return [shifted(truth[tuple(box)], 2) for box in boxes]

    monkeypatch.setattr(image_tasks, "PointedImages", Answers)

    result = run(image_tasks.BoxTask(), [subset])

    masks = json.loads(result.predictions[0].read_text())
    official = COCO(str(subset.truth[0]))
    ious = []
    for each in masks:
        annotation = official.anns[each["annotation_id"]]
        assert annotation["image_id"] == each["image_id"]
        assert annotation["category_id"] == each["category_id"]
        first, second = decode_rle(each["segmentation"]), official.annToMask(annotation) > 0
        ious.append((first & second).sum() / (first | second).sum())
    assert len(masks) == len(official.anns)
    assert 0.3 < np.mean(ious) < 0.95
    assert by_metric(result)["mIoU"] == pytest.approx(np.mean(ious))


def follow_truth(clips: Any) -> Any:
    """A stand-in for `follow_objects`: logits of the truth, a few pixels beside."""
    import torch

    truth = {next(iter(clip.video)).pixels.tobytes(): clip for clip in clips}

    def follow_objects(loaded, frames, masks):
        clip = truth[frames[0].tobytes()]
        of_number = dict(enumerate(clip.masklets, start=1))
        begun: set[int] = set()
        for index in range(len(frames)):
            begun |= set(masks.get(index, {}))
            logits = {}
            for number in sorted(begun):
                rle = of_number[number].rles.get(index)
                mask = (
                    np.zeros((SIDE, SIDE)) if rle is None else shifted(decode_rle(rle), index % 3)
                )
                logits[number] = torch.from_numpy(mask * (1.0 + number) - 0.5)
            yield index, logits

    return follow_objects


@pytest.mark.parametrize("form", ["davis2017", "mosev2", "youtube_vos", "sav_folders"])
def test_pngs_score_to_the_reported_numbers(form, run, tmp_path, monkeypatch):
    split = "val"
    write_synthetic(
        tmp_path / "data", form.removesuffix("v2"), split, count=2, side=SIDE, num_frames=13
    )
    asked = form if form == "mosev2" else None  # its files are those of MOSE
    (subset,) = find_subsets(tmp_path / "data", video_tasks.VosTask.formats, asked)
    clips = list(subset.open(None).samples)
    monkeypatch.setattr(video_tasks, "follow_objects", follow_truth(clips))

    result = run(video_tasks.VosTask(), [subset])

    rule = video_tasks.RULES[subset.form]
    scores = []
    for clip in clips:
        folder = result.predictions[0] / str(clip.source_id)
        stems = clip.frame_names or []
        for number, masklet in enumerate(clip.masklets, start=1):
            frames = [stems[index] for index in clip.annotated_frames]
            if form == "sav_folders":
                paths = [folder / str(masklet.source_id) / f"{stem}.png" for stem in frames]
                predicted = [np.asarray(Image.open(path)) > 0 for path in paths]
            else:
                labels = [np.asarray(Image.open(folder / f"{stem}.png")) for stem in frames]
                predicted = [each == number for each in labels]
            truth = [masklet.rles.get(index) for index in clip.annotated_frames]
            if rule in ("davis", "mosev2") and truth[0] is None:
                continue  # not in the first frame
            score = video_objects.score_object(predicted, truth, rule)
            if score is not None:
                scores.append(score)
    expected = video_objects.summarize(units.stack(scores))
    second = "F_dot" if form == "mosev2" else "F"
    assert 0.2 < expected[f"J&{second}"] < 0.98
    for name in ("J", second, f"J&{second}"):
        assert by_metric(result)[name] == pytest.approx(expected[name], abs=1e-12)


def test_youtube_vos_tells_seen_categories_from_the_training_set(run, tmp_path, monkeypatch):
    write_synthetic(tmp_path / "data", "youtube_vos", "val", count=2, side=SIDE, num_frames=6)
    path = tmp_path / "data" / "val" / "meta.json"
    meta = json.loads(path.read_text())
    for video in meta["videos"].values():
        for number, each in video["objects"].items():
            each["category"] = "ape" if number == "1" else "zebra"
    path.write_text(json.dumps(meta))
    (tmp_path / "data" / "train").mkdir()
    training = {"videos": {"0": {"objects": {"1": {"category": "ape"}}}}}
    (tmp_path / "data" / "train" / "meta.json").write_text(json.dumps(training))
    (subset,) = find_subsets(tmp_path / "data", ["youtube-vos"])
    monkeypatch.setattr(
        video_tasks, "follow_objects", follow_truth(list(subset.open(None).samples))
    )

    found = by_metric(run(video_tasks.VosTask(), [subset]))

    parts = [found[f"{name}_{part}"] for name in "JF" for part in ("seen", "unseen")]
    assert found["G"] == pytest.approx(np.mean(parts))


def test_lvos_counts_the_frames_of_an_object_s_range_and_not_its_end(run, tmp_path, monkeypatch):
    write_synthetic(tmp_path / "data", "lvos", "val", count=1, side=SIDE, num_frames=10)
    path = tmp_path / "data" / "val_meta.json"
    meta = json.loads(path.read_text())
    (video,) = meta["videos"].values()
    for each in video["objects"].values():
        each["frame_range"] = {"start": "00000002", "end": "00000007", "frame_nums": "5"}
    path.write_text(json.dumps(meta))
    (subset,) = find_subsets(tmp_path / "data", ["lvos"])
    (clip,) = subset.open(None).samples
    monkeypatch.setattr(video_tasks, "follow_objects", follow_truth([clip]))

    result = run(video_tasks.VosTask(), [subset])

    expected = []
    for number, masklet in enumerate(clip.masklets, start=1):
        ious = []
        for frame in range(2, 7):  # as its evaluator goes through them
            labels = Image.open(result.predictions[0] / str(clip.source_id) / f"{frame:05d}.png")
            rle = masklet.rles.get(frame)
            truth = np.zeros((SIDE, SIDE), dtype=bool) if rle is None else decode_rle(rle)
            ious.append(video_objects.region_similarity(np.asarray(labels) == number, truth))
        expected.append(np.mean(ious))
    assert units.load(result.folder / "units.npz")["J"] == pytest.approx(expected, abs=1e-12)


def test_masklets_score_in_the_official_form_to_the_reported_numbers(run, tmp_path, monkeypatch):
    write_synthetic(tmp_path / "veval", "saco_video", "val", count=4, side=SIDE, num_frames=6)
    (subset,) = find_subsets(tmp_path / "veval", ["saco-video"])
    clips = list(subset.open(None).samples)
    truth = {next(iter(clip.video)).pixels.tobytes(): clip for clip in clips}

    def follow_concepts(loaded, frames, phrases):
        import torch

        clip = truth[frames[0].tobytes()]
        for index in range(len(frames)):
            masks, numbers, of_phrase = [], [], {}
            for place, query in enumerate(clip.queries):
                shown = list(query.masklets or [])[: 2 if place else 1]
                for order, masklet in enumerate(shown):
                    if query.phrase not in phrases or index not in masklet.rles:
                        continue
                    number = 10 * place + order
                    masks.append(shifted(decode_rle(masklet.rles[index]), index % 3))
                    numbers.append(number)
                    of_phrase.setdefault(query.phrase, []).append(number)
            if index > 3 and clip is clips[0]:  # something that is not there
                masks.append(np.eye(SIDE, dtype=bool))
                numbers.append(99)
                of_phrase.setdefault(phrases[-1], []).append(99)
            stacked = torch.from_numpy(np.array(masks).reshape(-1, SIDE, SIDE))
            yield (
                index,
                {
                    "object_ids": torch.tensor(numbers),
                    "scores": torch.full((len(numbers),), 0.75),
                    "masks": stacked,
                    "prompt_to_obj_ids": of_phrase,
                },
            )

    monkeypatch.setattr(video_tasks, "follow_concepts", follow_concepts)

    result = run(video_tasks.ConceptVideoTask(batch_size=2), [subset])

    predictions = json.loads(result.predictions[0].read_text())
    expected = video_concept.summarize(
        video_concept.score_files(json.loads(Path(subset.truth[0]).read_text()), predictions)
    )
    assert 0.1 < expected["pHOTA"] < 0.98
    assert 0.02 < expected["cgF1"] < 0.98
    for name in ("cgF1", "pHOTA", "DetA", "AssA", "IL_MCC"):
        assert by_metric(result)[name] == pytest.approx(expected[name], abs=1e-12)
