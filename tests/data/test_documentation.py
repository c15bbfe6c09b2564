"""The code in docs/data.md that needs no dataset does what the page says."""

import re
from pathlib import Path

from torch.utils.data import DataLoader

from efficientsam3_hf.data.collators import ImageCollator

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_synthetic_world_is_as_the_page_says(processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"DataLoader": DataLoader, "ImageCollator": ImageCollator, "processor": processor}
    blocks = [block for block in BLOCKS if "data.synthetic" in block]

    for block in blocks:
        exec(block.replace("num_workers=2", "num_workers=0"), names)

    assert len(blocks) == 2
    assert len(names["world"].vocabulary()) == 13  # as the comment has it
    batch = next(iter(names["loader"]))
    assert len(batch["pixel_values"]) == 8
    assert len(batch["labels"]) == 8 * 4
    assert (tmp_path / "folder").is_dir()
