"""Batches out of samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_tracker_video

from efficientsam3_hf import EfficientSam3ImageProcessor
from efficientsam3_hf.data.augmentations import Augmentations, Change
from efficientsam3_hf.data.collators import (
    ClipCollator,
    ImageCollator,
    PhraseCollator,
    PictureCollator,
    stack_masks,
)
from efficientsam3_hf.data.masks_rle import to_rle
from efficientsam3_hf.data.phrases import TextSample
from efficientsam3_hf.data.samples import ImageSample, Instance, Query
from efficientsam3_hf.data.synthetic import Clips, Scenes


@pytest.fixture
def sample() -> ImageSample:
    mask = np.zeros((40, 80), dtype=bool)
    mask[10:30, 20:60] = True
    left = Instance((20, 10, 60, 30), to_rle(mask, (40, 80)), source_id=1)
    box_only = Instance((0, 0, 8, 4), is_crowd=True, source_id=2)
    queries = [
        Query("a door", [left, box_only], source_id=7),
        Query("a cat", []),
        Query("a dog", None),
    ]
    return ImageSample("own", 3, "x.jpg", (40, 80), queries, np.zeros((40, 80, 3), np.uint8))


def test_labels_stand_in_the_order_of_the_prompts(processor, sample):
    batch = ImageCollator(processor, mask_size=(20, 40))([sample, sample])

    assert batch["pixel_values"].shape == (2, 3, 112, 112)
    assert len(batch["input_ids"]) == len(batch["labels"]) == 6
    assert batch["image_indices"].tolist() == [label["image"] for label in batch["labels"]]
    assert {label["image_id"] for label in batch["labels"]} == {3}
    assert [label["phrase"] for label in batch["labels"][:3]] == ["a door", "a cat", "a dog"]
    assert [bool(label["is_exhaustive"]) for label in batch["labels"][:3]] == [True, True, False]


def test_a_label_says_where_things_are(processor, sample):
    label = ImageCollator(processor, mask_size=(20, 40))([sample])["labels"][0]

    torch.testing.assert_close(
        label["boxes"], torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.05, 0.05, 0.1, 0.1]])
    )
    expected = torch.zeros(20, 40, dtype=torch.bool)
    expected[5:15, 10:30] = True
    assert torch.equal(label["masks"][0], expected)
    assert not label["masks"][1].any()
    assert label["is_crowd"].tolist() == [False, True]
    assert label["points"].shape == (2, 2)
    x, y = (label["points"][0] * torch.tensor([80, 40])).tolist()
    assert sample.queries[0].instances[0].mask[int(y), int(x)]


def test_a_pixel_of_a_smaller_mask_is_inside_if_half_of_it_is():
    mask = np.zeros((2, 8), dtype=bool)
    mask[0, 0] = True  # a quarter of the first pixel of four
    mask[:, 2] = True  # half of the second
    mask[:, 4:6] = True

    (row,) = stack_masks([to_rle(mask, (2, 8))], (2, 8), (1, 4))[0]

    assert row.tolist() == [False, True, True, False]


def test_the_smallest_instances_are_left_out_and_the_label_says_so(processor, sample):
    label = ImageCollator(processor, most_instances=1)([sample])["labels"][0]

    assert len(label["boxes"]) == 1
    assert label["boxes"][0, 2] == 0.5
    assert not label["is_exhaustive"]


def test_masks_without_names_need_no_text(processor):
    scenes = Scenes(2, side=64, ask="anything")

    batch = ImageCollator(processor)([scenes[0], scenes[1]])

    assert "input_ids" not in batch
    assert [label["phrase"] for label in batch["labels"]] == [None, None]


def test_queries_with_and_without_phrase_do_not_mix(processor, sample):
    with pytest.raises(ValueError, match="load them apart"):
        ImageCollator(processor)([sample, Scenes(1, ask="anything")[0]])


def test_what_could_not_be_read_is_left_out(processor, sample):
    assert len(ImageCollator(processor)([None, sample])["pixel_values"]) == 1
    with pytest.raises(ValueError, match="None of the 2 samples"):
        ImageCollator(processor)([None, None])
    sample.image = None
    with pytest.raises(ValueError, match="without pixels"):
        ImageCollator(processor)([sample])


def test_clips_give_frames_and_masks_of_each_object(processor):
    clips = Clips(4, side=64, num_frames=5, annotate_every=2)

    batch = ClipCollator(processor.image_processor, mask_size=(32, 32))([clips[0], clips[1]])

    assert batch["pixel_values"].shape == (2, 5, 3, 112, 112)
    label, masklets = batch["labels"][0], clips[0].masklets
    assert label["masks"].shape == (len(masklets), 5, 32, 32)
    assert label["is_annotated"].tolist() == [True, False, True, False, True]
    assert label["is_visible"].tolist() == [[i in m.rles for i in range(5)] for m in masklets]
    assert label["object_ids"] == [masklet.source_id for masklet in masklets]
    assert not label["masks"][~label["is_visible"]].any()
    assert label["boxes"][label["is_visible"]].gt(0).all()


def test_a_batch_goes_into_the_model(processor, model):
    scenes = Scenes(3, side=64)
    batch = ImageCollator(processor)([scenes[0], scenes[1]])
    labels = batch.pop("labels")

    outputs = model(**batch)

    assert len(outputs.pred_masks) == len(outputs.presence_logits) == len(labels) == 8


def test_images_without_queries_stay_for_their_features(processor):
    with_queries, without = Scenes(2, side=64)[0], Scenes(2, side=64)[1]
    without.queries = []

    batch = ImageCollator(processor)([without, with_queries])

    assert len(batch["pixel_values"]) == 2
    assert batch["image_indices"].tolist() == [1] * 4
    assert [label["image"] for label in batch["labels"]] == [1] * 4
    assert "input_ids" not in ImageCollator(processor)([without])


def test_clips_go_into_the_tracker(processor):
    clips = Clips(2, side=64, num_frames=3, least=3, most=3)
    batch = ClipCollator(processor.image_processor, mask_size=(28, 28))([clips[0], clips[1]])
    masks = torch.stack([label["masks"] for label in batch["labels"]]).float()

    outputs = tiny_tracker_video("perceiver").forward_clip(
        batch["pixel_values"], input_masks=masks[:, :, 0], memory_masks=masks.transpose(1, 2)
    )

    assert outputs.pred_masks.shape == (2, 3, 3, 32, 32)


def test_clips_of_different_lengths_do_not_mix(processor):
    first, second = Clips(1, side=32, num_frames=3)[0], Clips(1, side=32, num_frames=4)[0]

    with pytest.raises(ValueError, match=r"Clips of \[3, 4\] frames"):
        ClipCollator(processor.image_processor)([first, second])
    second.frames = None
    with pytest.raises(ValueError, match="take a cut"):
        ClipCollator(processor.image_processor)([second])


class OneChange(Augmentations):
    """The same change for all samples."""

    def __init__(self, change: Change):
        super().__init__()
        self.change = change

    def choose(self, sample):
        return self.change


@pytest.mark.parametrize("flip", [False, True])
def test_valid_is_where_a_picture_lies_on_its_canvas(processor, flip):
    white = np.full((80, 160, 3), 255, np.uint8)
    white[::2] = 253  # so that the canvas, of the mean colour, is told apart
    sample = ImageSample("own", 1, "x.jpg", (80, 160), [], white)
    change = Change(flip=flip, scale=0.5, place=(0.25, 1.0))

    batch = PictureCollator(processor.image_processor, [OneChange(change)])([sample])

    # 40 of 80 rows, 80 of 160 columns; 20 of the 80 columns left are to the left of it.
    expected = torch.zeros(112, 112, dtype=torch.bool)
    expected[56:, 14:70] = True
    if flip:
        expected = expected.flip(1)
    assert torch.equal(batch["valid"][0], expected)
    asked = replace(sample, queries=[Query("snow", [])])
    collate = ImageCollator(processor, augment=[OneChange(change)], gives_valid=True)
    both = collate([asked, replace(asked, covered=(0.0, 0.0, 80.0, 80.0))])
    assert torch.equal(both["valid"][0], expected)
    # The second covered only the left half of its canvas before.
    left = torch.zeros_like(expected)
    left[56:, 14:42] = True
    assert torch.equal(both["valid"][1], left.flip(1) if flip else left)
    assert "valid" not in ImageCollator(processor, augment=[OneChange(change)])([asked])
    canvas = batch["pixel_values"][0, 0][~expected]
    assert canvas.std() < 1e-3  # of one colour, apart from the rim of the resize


@pytest.mark.parametrize("scale", [1.2, 4.0])
def test_a_picture_larger_than_its_canvas_covers_it(processor, scale):
    sample = Scenes(1, side=64)[0]

    batch = PictureCollator(processor.image_processor, [OneChange(Change(scale=scale))])([sample])

    assert batch["valid"].all()


def test_a_teacher_of_another_size_gets_the_same_pictures_at_its_own(processor):
    small = processor.image_processor
    large = EfficientSam3ImageProcessor(size={"height": 140, "width": 140})
    samples = [Scenes(2, side=64)[index] for index in range(2)]

    augment = [Augmentations(seed=3)]
    batch = PictureCollator(small, augment, teacher_processor=large)([None, *samples])
    alone = PictureCollator(large, augment)(samples)

    assert batch["pixel_values"].shape == (2, 3, 112, 112)
    assert torch.equal(batch["teacher_pixel_values"], alone["pixel_values"])
    assert batch["names"] == ["synthetic/0", "synthetic/1"]
    same = PictureCollator(small, teacher_processor=small)(samples)
    assert "teacher_pixel_values" not in same
    assert "valid" not in same


def test_shuffled_phrases_have_the_same_words(processor):
    collate = PhraseCollator(processor)
    text = "a waterproof red umbrella by the schoolhouse"
    samples = [TextSample(text, "1"), TextSample("dog", "2")]

    batch = collate(samples)

    ids, shuffled = batch["input_ids"], batch["shuffled_ids"]
    assert torch.equal(shuffled[1], ids[1])
    assert not torch.equal(shuffled[0], ids[0])
    words = processor.tokenizer.decode(shuffled[0], skip_special_tokens=True).split("!")[0].split()
    assert words != text.split()
    assert sorted(words) == sorted(text.split())  # no word was torn apart
    ends = batch["attention_mask"].sum(dim=1) - 1
    for row, end in zip(shuffled, ends, strict=True):
        assert row[0] == processor.tokenizer.bos_token_id
        assert row[end] == processor.tokenizer.eos_token_id
        assert not row[end + 1 :].any()


def test_an_order_of_words_depends_on_phrase_seed_and_epoch_alone(processor):
    text = TextSample("one two three four five six seven", "1")
    collate = PhraseCollator(processor, seed=1)
    first = collate([text])["shuffled_ids"][0]

    assert torch.equal(collate([TextSample("cat", "2"), text])["shuffled_ids"][1], first)
    collate.set_epoch(1)
    assert not torch.equal(collate([text])["shuffled_ids"][0], first)
    collate.set_epoch(0)
    assert torch.equal(collate([text])["shuffled_ids"][0], first)
    assert not torch.equal(PhraseCollator(processor, seed=2)([text])["shuffled_ids"][0], first)


def test_a_phrase_that_is_cut_keeps_what_is_left_of_it(processor):
    text = TextSample(" ".join(["internationalization"] * 3 + ["umbrella"] * 20), "1")

    batch = PhraseCollator(processor)([text])

    assert sorted(batch["shuffled_ids"][0].tolist()) == sorted(batch["input_ids"][0].tolist())
    assert "shuffled_ids" not in PhraseCollator(processor, shuffle=False)([text])


def test_a_teacher_of_another_size_gets_the_same_pictures(processor, sample):
    other = EfficientSam3ImageProcessor(size={"height": 126, "width": 126})

    batch = ImageCollator(processor, teacher_processor=other)([sample])
    same = ImageCollator(processor, teacher_processor=processor.image_processor)([sample])

    expected = other([sample.image], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["teacher_pixel_values"], expected)
    assert "teacher_pixel_values" not in same
