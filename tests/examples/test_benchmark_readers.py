"""The benchmark of the readers."""

from examples import benchmark_readers


def test_every_row_has_a_rate(monkeypatch, capsys):
    for name in ("IMAGES", "VIDEOS"):
        sides = dict.fromkeys(getattr(benchmark_readers, name), 32)
        monkeypatch.setattr(benchmark_readers, name, sides)
    monkeypatch.setattr(benchmark_readers, "SA1B_SIDE", 64)

    benchmark_readers.main(["--images", "2", "--clips", "1", "--seconds", "0.01"])

    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 4 + 2 * 4 + 6 + 2 + 8 + 3
    assert all(int(row.split("|")[2].replace(",", "")) > 0 for row in rows)
