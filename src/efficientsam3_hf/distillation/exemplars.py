"""Examples beside phrases, and in place of them: boxes around one of what a phrase names."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.configuration_efficientsam3 import EfficientSam3Config
from ..models.prompts import VISUAL_PHRASE
from ..tokenizer import build_tokenizer
from .prompts import choose_concepts, read_objects

OF_INSTANCES = ("masks", "boxes", "points", "is_crowd")  # in a label

Tokens = tuple[Tensor, Tensor]  # ids and mask (phrases, length)


def visual_tokens(config: EfficientSam3Config) -> Tokens:
    """Tokens (1, length) of the phrase that goes with exemplars alone."""
    tokenizer = build_tokenizer(config.text_config.max_position_embeddings, config.words)
    tokens = tokenizer(VISUAL_PHRASE, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


def without_words(tokens: Tokens, has_words: Tensor, visual: Tokens) -> Tokens:
    """Tokens of phrases, where some have no words in use.

    Args:
        tokens: Of the phrases.
        has_words: (phrases,), false where an exemplar is alone.
        visual: As `visual_tokens` gives them.
    """
    replaced = []
    for given, instead in zip(tokens, visual, strict=True):
        longest = max(given.shape[1], instead.shape[1])
        given, instead = (F.pad(each, (0, longest - each.shape[1])) for each in (given, instead))
        is_kept = has_words.to(given.device)[:, None]
        replaced.append(torch.where(is_kept, given, instead.to(given)))
    return replaced[0], replaced[1]


def with_exemplars(
    inputs: Mapping[str, Any], visual: Tokens, share: float, alone: float, seed: int, step: int
) -> Mapping[str, Any]:
    """A batch where some phrases have one of their instances as exemplar, some of these no words.

    All prompts have a box, of which most say nothing: every process asks its heads for the same.
    What else looks like an exemplar, labels do not say: of those without words, the exemplar itself
    is all that is known.

    Args:
        inputs: As `ImageCollator` makes them.
        visual: As `visual_tokens` gives them.
        share: How many of the phrases that name something get an exemplar.
        alone: How many of these lose their words.
        seed: Another one makes other choices.
        step: Of training, likewise.
    """
    labels = inputs["labels"]
    objects = read_objects(labels, len(inputs["pixel_values"]))
    concepts = choose_concepts(
        labels,
        objects,
        len(labels),
        seed,
        step,
        has_phrases=True,
        exemplar_share=share,
        exemplar_alone=alone,
    )
    concepts = concepts[concepts.label.argsort()]
    device = inputs["input_ids"].device
    tokens = inputs["input_ids"], inputs["attention_mask"]
    ids, mask = without_words(tokens, concepts.has_words, visual)
    return {
        **inputs,
        "input_ids": ids,
        "attention_mask": mask,
        "input_boxes": concepts.boxes_cxcywh.to(device),
        "input_boxes_labels": concepts.boxes_labels.to(device),
        "labels": [
            label if has_words else only(label, instance)
            for label, has_words, instance in zip(
                labels, concepts.has_words.tolist(), concepts.instance.tolist(), strict=True
            )
        ],
    }


def only(label: Mapping[str, Any], instance: int) -> dict[str, Any]:
    """A label that knows one of its instances, and not what else there may be."""
    known = {name: label[name][instance : instance + 1] for name in OF_INSTANCES}
    return {
        **label,
        **known,
        "phrase": VISUAL_PHRASE,
        "is_exhaustive": torch.tensor(False),
    }
