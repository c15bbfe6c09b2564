"""The code in docs/hub.md does what the page says."""

import re
from pathlib import Path

import pytest

from efficientsam3_hf import EfficientSam3Model, EfficientSam3Processor, EfficientSam3TrackerModel

# As in test_push_and_pull.py.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
PAGE = Path(__file__).parents[2] / "docs" / "hub.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_page_is_run_from_top_to_bottom(
    hub, fresh, model, joint_tracker, processor, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    names = {"model": model, "tracker": joint_tracker, "processor": processor}
    remote = []

    for block in BLOCKS:
        if "trust_remote_code" in block:
            remote.append(block)
        else:
            exec(block, names)

    assert len(BLOCKS) == 7
    assert "remote_code.py" in hub.files("you/concepts")
    assert isinstance(names["model"], EfficientSam3Model)
    assert isinstance(names["tracker"], EfficientSam3TrackerModel)
    assert isinstance(names["processor"], EfficientSam3Processor)
    left = fresh.run("execute", "\n".join(remote))
    for name in ("model", "tracker", "processor", "tracker_processor"):
        assert left[name].startswith("transformers_modules."), name
