"""transformers' own common tests of processors and image processors.

`make common-tests` fetches them for the installed transformers; `make test` does so by itself.
"""

import sys
import unittest
from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from transformers.models.sam3.modeling_sam3 import Sam3ImageSegmentationOutput

from efficientsam3_hf import (
    EfficientSam3ImageProcessor,
    EfficientSam3Processor,
    EfficientSam3TrackerProcessor,
    tokenizer,
)

pytest.importorskip("transformers_tests", reason="`make common-tests` fetches them")
# They import it from transformers' repository, to find files of the Hub that no test here reads.
sys.modules.setdefault("fetch_hub_objects_for_ci", SimpleNamespace(url_to_local_path=str))
from transformers_tests.test_image_processing_common import (  # noqa: E402  after the stand-in
    ImageProcessingTester,
    ImageProcessingTestMixin,
    PostProcessSemanticSegmentationTestMixin,
)
from transformers_tests.test_processing_common import ProcessorTesterMixin  # noqa: E402

SIZE = {"height": 56, "width": 56}


def skip(reason: str) -> Callable:
    return unittest.skip(reason)(lambda self: None)


class SmallImages(ImageProcessingTester):
    def __init__(self, parent):
        super().__init__(parent, size=SIZE, max_resolution=80)

    def _get_image_processing_classes(self):
        """Told here, since transformers would read the model type off the folder of this file."""
        return {"torchvision": EfficientSam3ImageProcessor}

    def prepare_post_process_semantic_segmentation_inputs(self):
        """One map, of all instances, where other models have one for each class."""
        outputs = Sam3ImageSegmentationOutput(semantic_seg=torch.randn(self.batch_size, 1, 56, 56))
        return {"outputs": outputs}, {"num_labels": 1, **SIZE}


class TestImageProcessor(
    ImageProcessingTestMixin, PostProcessSemanticSegmentationTestMixin, unittest.TestCase
):
    image_processor_tester_class = SmallImages
    test_cast_dtype = True
    test_valid_kwargs_set = skip("options are those of Sam3ImageProcessor, in another module")

    def test_call_numpy_4_channels(self):
        """Without conversion to RGB: transformers 5.20 counts on it to leave arrays alone."""
        with patch.object(EfficientSam3ImageProcessor, "do_convert_rgb", False):
            super().test_call_numpy_4_channels()


class ProcessorTests(ProcessorTesterMixin):
    """Ours share the habits in which SAM 3's processors differ from most others."""

    test_call_arguments_default_none = skip("return_tensors is 'pt': models take nothing else")
    test_call_arguments_not_in_processor_kwargs = skip("return_tensors has a place of its own")
    test_flat_kwarg_applied_when_modality_dict_lacks_it = skip(
        "options are all for the image processor, and not sorted by modality"
    )
    test_replacement_offsets = skip("no tokens stand for images; it looks for them in a mixin")

    @classmethod
    def _setup_image_processor(cls):
        return EfficientSam3ImageProcessor(size=SIZE)


class TestProcessor(ProcessorTests, unittest.TestCase):
    processor_class = EfficientSam3Processor
    test_subprocessor_defaults_0_text = skip("phrases are padded to the context length, with 0")

    @classmethod
    def _setup_tokenizer(cls):
        """With few merges, since it is saved and loaded a hundred times."""
        merges = tokenizer.read_merges()[:100]
        with patch.object(tokenizer, "read_merges", return_value=merges):
            return tokenizer.build_tokenizer(16)


class TestTrackerProcessor(ProcessorTests, unittest.TestCase):
    processor_class = EfficientSam3TrackerProcessor
