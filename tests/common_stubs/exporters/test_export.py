"""Stands in for transformers' export tests: exported, each model class computes the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import set_seed
from transformers.exporters.configs import DynamoConfig, OnnxConfig
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.exporter_onnx import OnnxExporter


def tensors_of(outputs: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


class ExportTesterMixin:
    """Builds on `all_model_classes`, `model_tester` and `_prepare_for_class` of the test class."""

    def test_torch_export(self):
        def export(model, inputs):
            exported = DynamoExporter().export(model, inputs, config=DynamoConfig())
            # Since transformers 5.23 torch's program comes wrapped.
            return getattr(exported, "program", exported).module()

        self.check_export(export)

    @pytest.mark.slow
    def test_onnx_export(self):
        self.check_export(lambda model, inputs: OnnxExporter().export(model, inputs, OnnxConfig()))

    def check_export(self, export: Callable) -> None:
        if not self.test_torch_exportable:
            self.skipTest("the test class says that its models cannot be exported")
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__), torch.no_grad():
                set_seed(0)
                config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
                inputs = self._prepare_for_class(inputs, model_class)
                model = model_class(config).eval()
                expected = tensors_of(model(**inputs))

                actual = tensors_of(export(model, dict(inputs))(**inputs))

                torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
