"""The benchmark of video memory, at a small size."""

import pytest

from examples.benchmark_memory import main


@pytest.mark.parametrize("objects", ["1", "2"])
def test_both_memories_are_compared(objects: str, capsys):
    main(["--image-size", "224", "--objects", objects, "--frames", "1", "--memories", "2"])

    rows = [row.split("|") for row in capsys.readouterr().out.splitlines() if "GFLOPs" in row]
    figures = {row[1].strip(): [float(cell) for cell in row[2:5]] for row in rows}
    assert set(figures) == {"attention GFLOPs", "frame GFLOPs"}
    for dense, perceiver, ratio in figures.values():
        assert ratio == pytest.approx(dense / perceiver, abs=0.1)
