"""transformers' own common model tests, on a tiny model of every class.

`make common-tests` fetches them, and `make test` does so by itself.
"""

import unittest

import pytest
import torch
from tiny import TINY_CLIP, TINY_TEXT, TINY_VIT, WIDTH, tiny_config, tiny_vision

from efficientsam3_hf import (
    EfficientSam3Backbone,
    EfficientSam3BackboneConfig,
    EfficientSam3Model,
    EfficientSam3TextConfig,
    EfficientSam3TextModel,
    EfficientSam3TrackerModel,
    EfficientSam3VisionConfig,
    EfficientSam3VisionModel,
)

pytest.importorskip("transformers_tests", reason="run `make common-tests` first")
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

BATCH = 3
TEXT = TINY_TEXT | {"vocab_size": 1000, "num_hidden_layers": 2, "max_position_embeddings": 8}


class Tester:
    batch_size = BATCH
    is_training = True
    num_hidden_layers = 1
    num_attention_heads = 4
    hidden_size = WIDTH
    seq_length = 8

    def __init__(self, get_config, get_inputs):
        self.get_config = get_config
        self.get_inputs = get_inputs

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), self.get_inputs()


def pixels(side=56):
    return {"pixel_values": floats_tensor([BATCH, 3, side, side])}


def phrases():
    return {
        "input_ids": ids_tensor([BATCH, 8], 1000),
        "attention_mask": torch.ones(BATCH, 8, dtype=torch.long),
    }


def vision(neck="sam3"):
    v = tiny_vision(neck)
    v["backbone_config"]["image_size"] = 64 if neck == "lateral" else 56
    return v


class CommonTests(ModelTesterMixin):
    has_attentions = False
    test_resize_embeddings = False
    config_fields = {}

    def setUp(self):
        self.model_tester = Tester(self.get_config, self.get_inputs)
        self.config_tester = ConfigTester(self, type(self.get_config()), has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()


class TestBackbone(CommonTests, unittest.TestCase):
    all_model_classes = (EfficientSam3Backbone,)

    def get_config(self):
        return EfficientSam3BackboneConfig(**vision()["backbone_config"])

    def get_inputs(self):
        return pixels()


class TestVision(CommonTests, unittest.TestCase):
    all_model_classes = (EfficientSam3VisionModel,)
    _is_composite = True

    def get_config(self):
        return EfficientSam3VisionConfig(**vision())

    def get_inputs(self):
        return pixels()


class TestLateralVision(TestVision):
    def get_config(self):
        return EfficientSam3VisionConfig(**vision("lateral"))

    def get_inputs(self):
        return pixels(64)


class TestText(CommonTests, unittest.TestCase):
    all_model_classes = (EfficientSam3TextModel,)

    def get_config(self):
        return EfficientSam3TextConfig(**TEXT)

    def get_inputs(self):
        return phrases()


class TestTracker(CommonTests, unittest.TestCase):
    all_model_classes = (EfficientSam3TrackerModel,)
    _is_composite = True

    def get_config(self):
        return tiny_config(vision(), TEXT).tracker_config

    def get_inputs(self):
        return pixels() | {
            "input_points": 56 * torch.rand(BATCH, 1, 2, 2),
            "input_labels": torch.ones(BATCH, 1, 2, dtype=torch.int),
        }


class TestConcept(CommonTests, unittest.TestCase):
    all_model_classes = (EfficientSam3Model,)
    _is_composite = True

    def get_config(self):
        return tiny_config(vision(), TEXT)

    def get_inputs(self):
        return pixels() | phrases()


class TestLateralConcept(TestConcept):
    def get_config(self):
        return tiny_config(vision("lateral"), TEXT)

    def get_inputs(self):
        return pixels(64) | phrases()


class TestTeacher(TestConcept):
    def get_config(self):
        return tiny_config(TINY_VIT, TINY_CLIP | {"vocab_size": 1000})

    def get_inputs(self):
        return pixels(112) | phrases()
