"""The script that times the scores, on tiny pictures."""

import pytest

from examples import benchmark_scores


def test_every_score_gets_a_rate(capsys):
    benchmark_scores.main(["--small", "--seconds", "0.01"])

    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == len(benchmark_scores.cases(small=True))
    for row in rows:
        rate, milliseconds = (float(cell) for cell in row.split("|")[2:4])
        assert rate * milliseconds == pytest.approx(1000, rel=0.02)
        assert rate > 0
