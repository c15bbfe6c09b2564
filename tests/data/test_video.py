"""Videos from files, folders, memory and iterators."""

import re
import sys
from contextlib import contextmanager
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from efficientsam3_hf.data.video import Frame, PicturesVideo, open_video

HEIGHT, WIDTH, LENGTH, RATE = 48, 64, 40, 10


def shade(index: int) -> np.ndarray:
    """A frame whose brightness tells its number, whatever compression does to it."""
    pixels = np.full((HEIGHT, WIDTH, 3), 20 + 5 * index, dtype=np.uint8)
    pixels[:, WIDTH // 2 :] = 40
    return pixels


def number(frame: Frame) -> int:
    return round((float(frame.pixels[:, : WIDTH // 2 - 4].mean()) - 20) / 5)


def write_video(path, frames=range(LENGTH), times=None, key_every: int = 12, codec="libx264"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.gop_size = key_every
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for position, index in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(shade(index), format="rgb24")
            frame.pts = position if times is None else times[position]
            container.mux(stream.encode(frame))
        if not frames:
            container.start_encoding()  # else nothing would be written at all
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "shades.mp4"
    write_video(path)
    return path


@pytest.mark.parametrize(
    ("start", "stop", "step"), [(0, None, 1), (0, 7, 1), (17, None, 1), (24, 31, 3), (39, None, 5)]
)
def test_the_frames_that_are_asked_for_come(path, start: int, stop: int | None, step: int):
    frames = list(open_video(path, start, stop, step))

    expected = list(range(LENGTH))[start:stop:step]
    assert [frame.index for frame in frames] == expected
    assert [number(frame) for frame in frames] == expected
    assert [frame.time for frame in frames] == pytest.approx([i / RATE for i in expected])


def test_a_file_knows_its_size_and_rate_and_is_read_again(path):
    video = open_video(path, stop=3)

    assert (video.height, video.width, video.fps) == (HEIGHT, WIDTH, RATE)
    assert [frame.index for frame in video] == [frame.index for frame in video] == [0, 1, 2]


def test_seeking_decodes_no_more_than_from_the_key_frame_before(path, monkeypatch):
    video = open_video(path, start=30, stop=31)
    decoded = []
    opened = video.opened

    @contextmanager
    def counted():
        with opened() as (container, stream):

            def decode(stream):
                for frame in container.decode(stream):
                    decoded.append(frame)
                    yield frame

            counting = SimpleNamespace(
                format=container.format, demux=container.demux, seek=container.seek, decode=decode
            )
            yield counting, stream

    monkeypatch.setattr(video, "opened", counted)

    (frame,) = video

    assert number(frame) == 30
    assert len(decoded) <= 12  # from the key frame before; the encoder sets one in 12


def test_frames_of_changing_rate_are_counted(tmp_path):
    times = np.cumsum([0, *([20, 100, 70] * 13)]).tolist()
    write_video(tmp_path / "unsteady.mkv", times=times)

    frames = list(open_video(tmp_path / "unsteady.mkv", start=5, stop=20, step=4))

    assert (
        [number(frame) for frame in frames] == [frame.index for frame in frames] == [5, 9, 13, 17]
    )


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for index in (0, 1, 2, 9, 10, 11):
        Image.fromarray(shade(index)).save(tmp_path / f"frame{index}.png")
    (tmp_path / "notes.txt").write_text("no picture")

    frames = list(open_video(tmp_path, start=1, step=2))

    assert [number(frame) for frame in frames] == [1, 9, 11]
    assert [frame.index for frame in frames] == [1, 3, 5]


@pytest.mark.parametrize("kind", ["array", "tensor", "channels first", "list", "PIL", "iterator"])
def test_what_is_in_memory_is_a_video_too(kind: str):
    array = np.stack([shade(index) for index in range(6)])
    source = {
        "array": array,
        "tensor": torch.from_numpy(array),
        "channels first": torch.from_numpy(array).movedim(-1, 1),
        "list": list(array),
        "PIL": [Image.fromarray(pixels) for pixels in array],
        "iterator": iter(array),
    }[kind]

    frames = list(open_video(source, start=1, stop=6, step=2))

    assert [frame.index for frame in frames] == [1, 3, 5]
    assert [number(frame) for frame in frames] == [1, 3, 5]


def test_an_iterator_without_end_is_asked_for_no_more_than_is_wanted():
    asked = []

    def camera():
        index = 0
        while True:
            asked.append(index)
            yield shade(index % 20)
            index += 1

    frames = open_video(camera(), step=2)

    assert [next(frames).index for _ in range(3)] == [0, 2, 4]
    assert asked == [0, 1, 2, 3, 4]


def test_a_file_that_is_none_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no video .*missing.mp4"):
        open_video(tmp_path / "missing.mp4")
    (tmp_path / "text.mp4").write_text("this is no video")
    with pytest.raises(ValueError, match=r"text.mp4 cannot be read as a video"):
        open_video(tmp_path / "text.mp4")


def test_a_file_cut_short_is_an_error_or_ends_where_its_frames_do(path, tmp_path):
    damaged = bytearray(path.read_bytes())
    (tmp_path / "short.mp4").write_bytes(damaged[: len(damaged) // 2])
    with pytest.raises(ValueError, match=r"short.mp4 cannot be read as a video"):  # no index
        open_video(tmp_path / "short.mp4")


def test_damage_in_the_middle_is_an_error_that_says_where(path, tmp_path):
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat")
    data[start + 1000 : start + 1200] = bytes(200)
    (tmp_path / "damaged.mp4").write_bytes(data)

    with pytest.raises(ValueError, match=r"damaged.mp4 is damaged at frame (\d+)") as error:
        list(open_video(tmp_path / "damaged.mp4"))

    first_bad = int(re.search(r"stop=(\d+)", str(error.value))[1])
    before = list(open_video(tmp_path / "damaged.mp4", stop=first_bad))
    assert [number(frame) for frame in before] == list(range(first_bad))


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())

    with pytest.raises(ValueError, match=r"sound.wav holds no video"):
        open_video(tmp_path / "sound.wav")


def test_a_video_without_frames_is_an_error(path, tmp_path):
    with pytest.raises(ValueError, match="holds no frames from frame 100 on"):
        list(open_video(path, start=100))
    with pytest.raises(ValueError, match="The video holds no frames"):
        list(open_video([]))
    with pytest.raises(ValueError, match="holds no pictures"):
        open_video(tmp_path)
    for name, message in (
        ("none.avi", "none.avi holds no frames"),
        ("none.mp4", "none.mp4 holds no video"),
        ("none.mkv", "none.mkv cannot be read as a video"),
    ):
        write_video(tmp_path / name, frames=(), codec="mpeg4")
        with pytest.raises(ValueError, match=message):
            list(open_video(tmp_path / name))
    with pytest.raises(ValueError, match="The iterator holds no frames"):
        list(open_video(iter([])))
    with pytest.raises(ValueError, match="The iterator holds no frames from frame 2 on"):
        list(open_video(iter([shade(0), shade(1)]), start=2))


def test_pictures_that_do_not_belong_together_are_errors(tmp_path):
    Image.fromarray(shade(0)).save(tmp_path / "0.png")
    Image.fromarray(shade(1)[:20]).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"Frame 1 of .* has 64 x 20 pixels, .* 64 x 48"):
        list(open_video(tmp_path))
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1.png is no picture that can be read"):
        list(open_video(tmp_path))


@pytest.mark.parametrize("span", [{"start": -1}, {"step": 0}, {"start": 5, "stop": 5}])
def test_spans_without_a_frame_are_errors(span):
    for source in ([shade(0)], iter([shade(0)])):
        with pytest.raises(ValueError, match="take no frame"):
            open_video(source, **span)


def test_a_span_that_would_not_be_heeded_is_an_error(path):
    video = open_video(path, start=3, stop=5)

    assert open_video(video) is video
    for span in ({"start": 1}, {"stop": 4}, {"step": 2}):
        with pytest.raises(ValueError, match="a start, stop and step of its own"):
            open_video(video, **span)


def test_frames_of_other_kinds_are_errors():
    with pytest.raises(ValueError, match=r"not \(48, 64\) of uint8"):
        list(open_video([shade(0)[..., 0]]))
    with pytest.raises(ValueError, match="of float32"):
        list(open_video(np.zeros((2, 8, 8, 3), dtype=np.float32)))
    with pytest.raises(TypeError, match="not a int"):
        open_video(7)


def test_without_pyav_the_error_says_how_to_get_it(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)

    with pytest.raises(ImportError, match=r"efficientsam3-hf\[video\]"):
        open_video(path)
    assert isinstance(open_video([shade(0)]), PicturesVideo)  # needs none
