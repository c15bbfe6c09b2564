"""Video cgF1 and pHOTA against TrackEval and against the formulas written out."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from random_masks import near, random_mask
from scipy.optimize import linear_sum_assignment

from efficientsam3_hf.evaluation import concept
from efficientsam3_hf.evaluation.units import stack
from efficientsam3_hf.evaluation.video_concept import (
    LOCALIZATIONS,
    score_files,
    score_pair,
    summarize,
    summarize_tracks,
    volume_overlaps,
)

SIZE = (6, 7)


def random_video(rng: np.random.Generator) -> tuple[list, list, list]:
    """Predicted masklets, their scores, true masklets; with gaps, switches and empty masks."""
    frames = int(rng.integers(1, 6))

    def masklet():
        base = random_mask(rng, SIZE)
        return [near(rng, base) if rng.random() < 0.8 else None for _ in range(frames)]

    truth = [masklet() for _ in range(rng.integers(4))]
    predicted = [
        [None if m is None or rng.random() < 0.1 else near(rng, m) for m in masklet]
        for masklet in truth
        if rng.random() < 0.8
    ]
    predicted += [masklet() for _ in range(rng.integers(2))]
    if len(predicted) > 1 and rng.random() < 0.3:  # identities are mixed up half way
        half = frames // 2
        one, other = predicted[:2]
        predicted[:2] = [one[:half] + other[half:], other[:half] + one[half:]]
    return predicted, [float(rng.choice([0.4, 0.5, 0.6, 1.0])) for _ in predicted], truth


def iou(first: np.ndarray | None, second: np.ndarray | None) -> float:
    union = np.sum(first | second)
    return float(np.sum(first & second) / union) if union else 0.0


def slow_hota(videos: list[tuple]) -> dict[str, float]:
    """HOTA as in its paper, threshold by threshold and mask by mask."""
    means = {name: [] for name in ("pHOTA", "DetA", "AssA", "DetRe", "DetPr", "LocA")}
    for threshold in LOCALIZATIONS:
        found = wrong = missed = 0
        association = closeness = 0.0
        for predicted, scores, truth in videos:
            tracks = [
                [m if m is not None and m.any() else None for m in masklet]
                for masklet, score in zip(predicted, scores, strict=True)
                if score > 0.5
            ]
            frames = len((tracks or truth or [[]])[0])
            overlap = [
                [
                    [
                        0.0 if p[t] is None or g[t] is None else iou(p[t], g[t])
                        for t in range(frames)
                    ]
                    for p in tracks
                ]
                for g in truth
            ]
            length = [sum(m is not None for m in p) for p in tracks]
            true_length = [sum(m is not None for m in g) for g in truth]
            fit = np.zeros((len(truth), len(tracks)))
            for t in range(frames):
                now = np.array([[o[t] for o in row] for row in overlap]).reshape(fit.shape)
                for i in range(len(truth)):
                    for j in range(len(tracks)):
                        rest = now[i].sum() + now[:, j].sum() - now[i, j]
                        fit[i, j] += now[i, j] / rest if rest > 1e-15 else 0
            matched = np.zeros(fit.shape)
            for t in range(frames):
                gs = [i for i, g in enumerate(truth) if g[t] is not None]
                ps = [j for j, p in enumerate(tracks) if p[t] is not None]
                merit = np.zeros((len(gs), len(ps)))
                for a, i in enumerate(gs):
                    for b, j in enumerate(ps):
                        alignment = fit[i, j] / (true_length[i] + length[j] - fit[i, j])
                        merit[a, b] = alignment * overlap[i][j][t]
                hits = 0
                for a, b in zip(*linear_sum_assignment(-merit), strict=True):
                    value = overlap[gs[a]][ps[b]][t]
                    if value >= threshold - 1e-15:
                        matched[gs[a], ps[b]] += 1
                        closeness += value
                        hits += 1
                found, missed, wrong = found + hits, missed + len(gs) - hits, wrong + len(ps) - hits
            for i in range(len(truth)):
                for j in range(len(tracks)):
                    if matched[i, j]:
                        union = true_length[i] + length[j] - matched[i, j]
                        association += matched[i, j] ** 2 / union
        detection = found / max(1, found + wrong + missed)
        association = association / max(1, found)
        means["pHOTA"].append(np.sqrt(detection * association))
        means["DetA"].append(detection)
        means["AssA"].append(association)
        means["DetRe"].append(found / max(1, found + missed))
        means["DetPr"].append(found / max(1, found + wrong))
        means["LocA"].append(max(1e-10, closeness) / max(1e-10, found))
    return {name: float(np.mean(values)) for name, values in means.items()}


def as_trackeval(predicted: list, scores: list, truth: list) -> dict:
    """A pair as TrackEval's `HOTA.eval_sequence` takes it."""
    tracks = [
        [m if m is not None and m.any() else None for m in masklet]
        for masklet, score in zip(predicted, scores, strict=True)
        if score > 0.5
    ]
    frames = len((tracks or truth or [[]])[0])
    data = {"gt_ids": [], "tracker_ids": [], "similarity_scores": [], "num_timesteps": frames}
    for t in range(frames):
        gs = [i for i, g in enumerate(truth) if g[t] is not None]
        ps = [j for j, p in enumerate(tracks) if p[t] is not None]
        values = [[iou(truth[i][t], tracks[j][t]) for j in ps] for i in gs]
        data["gt_ids"].append(np.array(gs, dtype=int))
        data["tracker_ids"].append(np.array(ps, dtype=int))
        data["similarity_scores"].append(np.array(values, dtype=float).reshape(len(gs), len(ps)))
    for name, key in (("gt", "gt_ids"), ("tracker", "tracker_ids")):
        ids = np.unique(np.concatenate([*data[key], np.zeros(0, dtype=int)]))
        data[f"num_{name}_dets"] = sum(map(len, data[key]))
        data[f"num_{name}_ids"] = len(ids)
        data[key] = [np.searchsorted(ids, now) for now in data[key]]
    return data


def test_phota_is_that_of_the_formulas_written_out():
    rng = np.random.default_rng(0)
    videos = [random_video(rng) for _ in range(200)]
    records = [score_pair(*video) for video in videos]

    for _ in range(200):
        some = rng.integers(200, size=rng.integers(1, 8))
        summary = summarize(stack([records[index] for index in some]))
        for name, value in slow_hota([videos[index] for index in some]).items():
            assert summary[name] == pytest.approx(value, abs=1e-9), name


def test_phota_is_that_of_trackeval():
    trackeval = pytest.importorskip("trackeval", reason="TrackEval is not installed")
    metric = trackeval.metrics.HOTA()
    rng = np.random.default_rng(1)
    videos = [random_video(rng) for _ in range(200)]
    records = [score_pair(*video) for video in videos]
    sequences = {str(i): metric.eval_sequence(as_trackeval(*v)) for i, v in enumerate(videos)}

    for _ in range(200):
        some = rng.permutation(200)[: rng.integers(1, 20)]
        theirs = metric.combine_sequences({str(index): sequences[str(index)] for index in some})
        ours = summarize_tracks(stack([records[index] for index in some]))
        assert ours["pHOTA"] == pytest.approx(theirs["HOTA"].mean(), abs=1e-9)
        for name in ("DetA", "AssA", "DetRe", "DetPr", "AssRe", "AssPr", "LocA"):
            assert ours[name] == pytest.approx(theirs[name].mean(), abs=1e-9), name


def test_volume_overlap_sums_over_frames():
    rng = np.random.default_rng(2)
    for _ in range(200):
        predicted, _, truth = random_video(rng)
        overlaps = volume_overlaps(predicted, truth)
        for i, one in enumerate(predicted):
            for j, other in enumerate(truth):
                shared = total = 0
                for p, g in zip(one, other, strict=True):
                    p = np.zeros(SIZE, dtype=bool) if p is None else p
                    g = np.zeros(SIZE, dtype=bool) if g is None else g
                    shared, total = shared + np.sum(p & g), total + np.sum(p | g)
                expected = shared / total if total else 1.0
                assert overlaps[i, j] == pytest.approx(expected, abs=1e-12)


def test_cgf1_of_still_videos_is_that_of_images():
    rng = np.random.default_rng(3)
    videos, images = [], []
    for _ in range(200):
        truth = [mask for mask in (random_mask(rng, SIZE) for _ in range(3)) if mask.any()]
        predicted = [near(rng, mask) for mask in truth if rng.random() < 0.8]
        predicted = [mask for mask in predicted if mask.any()]
        scores = [float(rng.choice([0.4, 0.5, 1.0])) for _ in predicted]
        crowd = [bool(rng.random() < 0.2) for _ in truth]
        videos.append(
            score_pair([[m] * 3 for m in predicted], scores, [[m] * 3 for m in truth], crowd)
        )
        images.append(concept.score_pair(predicted, scores, truth, crowd))

    summary, expected = summarize(stack(videos)), concept.summarize(stack(images))

    assert {name: summary[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_a_switch_of_identities_done_by_hand():
    left, right = np.zeros(SIZE, dtype=bool), np.zeros(SIZE, dtype=bool)
    left[:, :2], right[:, 5:] = True, True
    truth = [[left] * 4, [right] * 4]
    switched = [[left, left, right, right], [right, right, left, left]]

    summary = summarize(stack([score_pair(switched, [0.9, 0.9], truth)]))

    # All masks are found; each true track shares 2 of 4 + 4 - 2 masks with each predicted one.
    assert summary["DetA"] == pytest.approx(1)
    assert summary["AssA"] == pytest.approx(1 / 3)
    assert summary["pHOTA"] == pytest.approx(np.sqrt(1 / 3))
    assert summary["cgF1"] == pytest.approx(0, abs=1e-6)  # volume IoU is 1 / 3


def test_a_score_at_the_threshold_counts_for_cgf1_but_not_for_phota():
    mask = np.ones(SIZE, dtype=bool)
    record = score_pair([[mask]], [0.5], [[mask]])

    assert record["found"].tolist() == [1] * 10
    assert record["hota_missed"].tolist() == [1] * 19
    assert record["hota_found"].tolist() == [0] * 19


def test_nothing_predicted_and_nothing_there():
    mask = np.ones(SIZE, dtype=bool)
    nothing = summarize(stack([score_pair([], [], [])]))
    assert nothing["pHOTA"] == 0
    assert nothing["LocA"] == 1  # as TrackEval has it

    assert summarize(stack([score_pair([], [], [[mask]])]))["DetRe"] == 0
    assert summarize(stack([score_pair([[mask]], [1.0], [])]))["DetPr"] == 0
    empty = score_pair([[np.zeros(SIZE)]], [1.0], [[mask]])  # a mask without pixels is no mask
    assert empty["hota_wrong"].tolist() == [0] * 19


def test_files_are_scored_pair_by_pair_negatives_included():
    rng = np.random.default_rng(4)
    truth = {"videos": [], "annotations": [], "video_np_pairs": []}
    predictions, records = [], []

    def rle(mask):
        return None if mask is None else coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))

    for video in range(20):
        truth["videos"].append({"id": video, "height": SIZE[0], "width": SIZE[1]})
        for category in range(2):
            predicted, scores, true = random_video(rng)
            key = {"video_id": video, "category_id": category}
            truth["video_np_pairs"].append({**key, "num_masklets": len(true)})
            for masklet in true:
                masks = [rle(mask) for mask in masklet]
                truth["annotations"].append({**key, "segmentations": masks, "iscrowd": 0})
            for masklet, score in zip(predicted, scores, strict=True):
                masks = [rle(mask) for mask in masklet]
                predictions.append({**key, "segmentations": masks, "score": score})
            records.append(score_pair(predicted, scores, true))

    units = score_files(truth, predictions)

    assert summarize(units) == pytest.approx(summarize(stack(records)), nan_ok=True)
    with pytest.raises(ValueError, match="none of the 40 pairs"):
        score_files(truth, [{"video_id": 0, "category_id": 9, "segmentations": [], "score": 1.0}])
