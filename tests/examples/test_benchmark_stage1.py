"""The benchmark of stage 1."""

from examples import benchmark_stage1


def test_both_ways_have_a_row(capsys, monkeypatch):
    monkeypatch.setattr(benchmark_stage1, "SIZES", {**benchmark_stage1.SIZES, "hidden_size": 64})

    benchmark_stage1.main(
        ["--count", "3", "--batch", "2", "--steps", "1", "--workers", "0", "--device", "cpu"]
    )

    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line][2:]
    assert [row[1].strip() for row in rows] == ["cache, int8", "teacher online"]
    for row in rows:
        assert float(row[2]) > 0
        assert 0 <= float(row[4].strip().rstrip("%")) <= 100
