"""The benchmark of the teacher's cache."""

from examples import benchmark_teacher_cache


def test_every_codec_has_a_row_and_the_student_waits(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_teacher_cache, "FULL_SIZE", (16, 256))

    benchmark_teacher_cache.main(["--count", "4", "--steps", "1", "--workers", "0"])

    _, _, *rows, empty, student = capsys.readouterr().out.splitlines()
    assert not empty
    assert [row.split("|")[1].strip() for row in rows] == ["fp16", "int8", "pca, 1/4", "pca, 1/8"]
    errors = [float(row.split("|")[3].strip(" %")) for row in rows]
    assert errors == sorted(errors)
    assert "steps a second from the cache" in student
