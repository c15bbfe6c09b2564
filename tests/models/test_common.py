"""transformers' own common tests of models, run on a tiny model of every class.

`make common-tests` fetches them for the installed transformers; `make test` does so by itself.
"""

import unittest
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tiny import TINY_CLIP, TINY_TEXT, TINY_VIT, WIDTH, tiny_config, tiny_vision
from torch import Tensor
from transformers import PreTrainedConfig

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

pytest.importorskip("transformers_tests", reason="`make common-tests` fetches them")
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

pytestmark = [
    # The tests write into outputs; the position encodings among them are views shared by a batch.
    pytest.mark.filterwarnings("ignore:Use of masked_fill_ on expanded tensors:UserWarning"),
    # ONNX knows 0, and not the -1 that torchvision takes for the same: as many samples as fit.
    pytest.mark.filterwarnings("ignore:ONNX export for RoIAlign with a non-zero:UserWarning"),
]

IMAGES = 3
TOKENS = 8
VOCABULARY = 1000  # the tests ask for models of less than a million parameters
TEXT = {**TINY_TEXT, "vocab_size": VOCABULARY, "max_position_embeddings": TOKENS}


def half_size(neck: str = "sam3") -> dict[str, Any]:
    """Vision encoder for 56 (`sam3`) or 64 (`lateral`) pixels."""
    configuration = tiny_vision(neck)
    configuration["backbone_config"]["image_size"] //= 2
    return configuration


def pixels(side: int) -> dict[str, Tensor]:
    return {"pixel_values": floats_tensor([IMAGES, 3, side, side])}


def phrases() -> dict[str, Tensor]:
    input_ids = ids_tensor([IMAGES, TOKENS], VOCABULARY)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def skip(reason: str) -> Callable:
    return unittest.skip(reason)(lambda self: None)


class CommonTests(ModelTesterMixin):
    """What all models share. A test is its own `model_tester`, which tells sizes and inputs."""

    batch_size = IMAGES
    num_hidden_layers = 1
    is_training = True
    has_attentions = False
    test_can_init_all_missing_weights_before_2023 = True  # what it takes files without a year for

    test_training = skip("only the concept model computes a loss: see test_concept_training.py")
    test_training_gradient_checkpointing = test_training
    test_training_gradient_checkpointing_use_reentrant_false = test_training
    test_training_gradient_checkpointing_use_reentrant_true = test_training
    # Slow ones, which some classes turn on again.
    test_bc_torch_dtype = skip("the same code of transformers for all models: see TestText")
    test_onnx_export = skip("half a minute for each model: see TestConcept, which has every part")
    test_torch_export = test_onnx_export
    test_can_init_all_missing_weights = skip("the parts are initialised alone or in TestConcept")

    def setUp(self):
        self.model_tester = self

    def get_config(self) -> PreTrainedConfig:
        raise NotImplementedError

    def get_inputs(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
        return self.get_config(), self.get_inputs()

    def initialise_all_missing_weights(self):
        """`test_can_init_all_missing_weights`, with leave to load what lacks weights."""
        with patch("efficientsam3_hf.models.checkpoint_layout.check_loading"):
            ModelTesterMixin.test_can_init_all_missing_weights(self)

    def test_config(self):
        config_class = type(self.get_config())
        ConfigTester(
            self, config_class, has_text_modality=False, common_properties=[]
        ).run_common_tests()

    def subTest(self, *args, **kwargs):
        """Nothing: a report on each of the thousands of weights costs more than the tests."""
        return nullcontext()


class TestText(CommonTests, unittest.TestCase):
    """A RepMixer, a layer that attends, and a RepMixer."""

    all_model_classes = (EfficientSam3TextModel,)
    expected_num_hidden_layers = 4
    num_attention_heads = 4
    hidden_size = WIDTH
    seq_length = TOKENS
    has_attentions = True
    test_resize_embeddings = False  # the vocabulary is CLIP's, and the end token its highest id
    test_bc_torch_dtype = ModelTesterMixin.test_bc_torch_dtype
    test_torch_export = ModelTesterMixin.test_torch_export
    test_can_init_all_missing_weights = CommonTests.initialise_all_missing_weights

    def get_config(self):
        return EfficientSam3TextConfig(**TEXT, attend_to_padding=False)

    def get_inputs(self):
        return phrases()


class VisionTests(CommonTests):
    """Their hidden states are the trunk's four maps, the first of a quarter of the image's side."""

    expected_num_hidden_layers = 4
    seq_length = hidden_size = 14
    test_resize_embeddings = False  # there are none
    test_model_get_set_embeddings = skip("pixels are not looked up in a table")
    test_gradient_checkpointing_enable_disable = skip(
        "looks for layers of transformers, and timm's trunk checkpoints itself: see test_vision.py"
    )

    def get_inputs(self):
        return pixels(4 * self.seq_length)


class TestBackbone(VisionTests, unittest.TestCase):
    all_model_classes = (EfficientSam3Backbone,)

    def get_config(self):
        return EfficientSam3BackboneConfig(**half_size()["backbone_config"])


class TestVision(VisionTests, unittest.TestCase):
    all_model_classes = (EfficientSam3VisionModel,)
    _is_composite = True

    def get_config(self):
        return EfficientSam3VisionConfig(**half_size())


class TestLateralVision(TestVision):
    seq_length = hidden_size = 16
    test_torch_export = ModelTesterMixin.test_torch_export
    test_can_init_all_missing_weights = CommonTests.initialise_all_missing_weights

    def get_config(self):
        return EfficientSam3VisionConfig(**half_size("lateral"))


class WholeTests(CommonTests):
    """Models of parts, each of which has hidden states and attentions."""

    _is_composite = True
    expected_num_hidden_layers = 4  # of the trunk, and of the text tower
    test_hidden_states_output = skip("hidden states are returned under the names of the parts")
    test_retain_grad_hidden_states_attentions = test_hidden_states_output

    def test_attn_implementation_composite_models(self):
        """Although attentions are not returned under that name."""
        self.has_attentions = True
        super().test_attn_implementation_composite_models()


class TestTracker(WholeTests, unittest.TestCase):
    all_model_classes = (EfficientSam3TrackerModel,)
    test_resize_embeddings = False  # there are none
    test_model_get_set_embeddings = skip("pixels are not looked up in a table")
    test_reverse_loading_mapping = skip(
        "asks for weights under every name of a checkpoint for all tasks: see test_loading.py"
    )
    test_torch_export = ModelTesterMixin.test_torch_export
    test_can_init_all_missing_weights = CommonTests.initialise_all_missing_weights

    def get_config(self):
        return tiny_config(half_size(), TEXT).tracker_config

    def get_inputs(self):
        points = {"input_points": 56 * torch.rand(IMAGES, 1, 2, 2)}
        labels = {"input_labels": torch.ones(IMAGES, 1, 2, dtype=torch.int)}
        return pixels(56) | points | labels


class TestConcept(WholeTests, unittest.TestCase):
    all_model_classes = (EfficientSam3Model,)
    test_onnx_export = ModelTesterMixin.test_onnx_export
    test_can_init_all_missing_weights = CommonTests.initialise_all_missing_weights

    def get_config(self):
        return tiny_config(half_size(), TEXT)

    def get_inputs(self):
        exemplars = {
            "input_boxes": torch.rand(IMAGES, 2, 4),
            "input_points": torch.rand(IMAGES, 1, 2),
        }
        return pixels(56) | phrases() | exemplars


class TestLateralConcept(TestConcept):
    test_onnx_export = CommonTests.test_onnx_export
    test_can_init_all_missing_weights = CommonTests.test_can_init_all_missing_weights

    def get_config(self):
        return tiny_config(half_size("lateral"), TEXT)

    def get_inputs(self):
        return super().get_inputs() | pixels(64)


class TestTeacher(TestConcept):
    """SAM 3 itself: its ViT and its text tower, of one layer."""

    expected_num_hidden_layers = 2
    test_onnx_export = CommonTests.test_onnx_export
    test_can_init_all_missing_weights = skip(
        "CLIP's own scales are not reached in models outside of transformers"
    )

    def get_config(self):
        return tiny_config(TINY_VIT, TINY_CLIP | {"vocab_size": VOCABULARY})

    def get_inputs(self):
        return super().get_inputs() | pixels(112)
