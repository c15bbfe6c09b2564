"""The cache on disk: exact, resumable, verified, refused by name where it does not fit."""

import copy
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from filelock import FileLock
from ranks import run_ranks
from safetensors.torch import load_file
from sam3_teachers import pictures, processor, tiny_sam3_video, tiny_teacher, write_pictures
from torch.utils.data import DataLoader

from efficientsam3_hf.data.augmentations import Augmentations
from efficientsam3_hf.data.clips import Cut
from efficientsam3_hf.data.collators import ClipCollator, ImageCollator
from efficientsam3_hf.data.files import read_image, write_image
from efficientsam3_hf.data.loading import load
from efficientsam3_hf.data.own_folder import OwnVideos
from efficientsam3_hf.data.synthetic import Clips
from efficientsam3_hf.distillation import cache_files
from efficientsam3_hf.distillation.cache_files import CacheError, DiskFullError
from efficientsam3_hf.distillation.cache_writer import CacheOptions, CacheWriter
from efficientsam3_hf.distillation.cached_features import CachedTeacherFeatures, decoded, flips
from efficientsam3_hf.distillation.teacher import clip_frames, load_teacher
from efficientsam3_hf.distillation.teacher_cache import TeacherCache

COUNT = 10
# Bytes of a picture are 64 tokens of 32 channels and 128 for scales, so this makes shards of three.
THREE_IN_A_SHARD = 0.0075


@pytest.fixture(scope="module", autouse=True)
def state() -> PartialState:
    """One process, as accelerate sees it."""
    return PartialState(cpu=True)


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_pictures(folder, COUNT)
    return folder


def options(**changes: Any) -> CacheOptions:
    small = {"batch_size": 2, "num_workers": 0, "shard_megabytes": THREE_IN_A_SHARD}
    return CacheOptions(**{**small, **changes})


def writer(folder: Path, photos: Path, teacher: Any, **changes: Any) -> CacheWriter:
    return CacheWriter(folder, pictures(photos), processor(), teacher, options(**changes))


@pytest.fixture(scope="module")
def finished(photos, teacher, tmp_path_factory) -> Path:
    """A cache in bytes, which tests copy before they damage it."""
    folder = tmp_path_factory.mktemp("cache") / "int8"
    writer(folder, photos, teacher).write()
    return folder


@pytest.fixture
def own(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "own"))


def seen(photos: Path, key: str) -> torch.Tensor:
    """What the model sees of a picture: (1, 3, height, width)."""
    image = read_image(str(photos / key.removeprefix("own/")))
    return processor()(image, return_tensors="pt")["pixel_values"]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({"codec": "fp16"}, 2**-11),
        # Half of a step is 1/254 of a channel's largest value, which is a few times its size.
        ({"codec": "int8"}, 0.02),
        ({"codec": "pca", "rank": 32}, 0.03),
        ({"codec": "pca", "energy": 0.9}, 0.1**0.5 + 0.05),
    ],
)
@pytest.mark.parametrize("kind", ["trunk", "levels"])
def test_what_is_read_is_what_the_teacher_says(
    photos, teacher, tmp_path, changes: dict, bound: float, kind: str
):
    cache = writer(tmp_path / "cache", photos, teacher, kind=kind, **changes).write()

    assert sorted(cache) == sorted(f"own/{number}.png" for number in range(COUNT))
    squares: dict[str, list[float]] = {}
    for key in cache:
        pixels = seen(photos, key)
        decoded = cache.decode(cache.read([key], pixels))
        for part, expected in teacher.features(kind, pixels).items():
            error = (decoded[part] - expected).square().sum().item()
            total = squares.setdefault(part, [0.0, 0.0])
            total[0] += error
            total[1] += expected.square().sum().item()
    for part, (error, size) in squares.items():
        measured = cache.errors[part]["relative_error"]
        assert measured == pytest.approx((error / size) ** 0.5, rel=1e-3)
        assert measured < bound
        assert cache.errors[part]["cosine"] > 1 - bound


def test_the_plan_is_what_comes_to_lie_on_disk(photos, teacher, tmp_path):
    for changes in ({}, {"flips": True}, {"codec": "fp16", "kind": "levels"}):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        making = writer(folder, photos, teacher, **changes)
        plan = making.plan()
        making.write()

        on_disk = sum(path.stat().st_size for path in folder.glob("shards/*.safetensors"))
        assert plan.bytes_to_write <= on_disk < plan.bytes_to_write + 1000 * plan.shards
        assert plan.shards == plan.shards_to_write == len(list(folder.glob("shards/*.json")))
        assert plan.seconds > 0
        assert plan.pictures == COUNT * (1 + changes.get("flips", False))
        assert f"{plan.shards} of {plan.shards} shards" in str(plan)
        assert writer(folder, photos, teacher, **changes).plan().bytes_to_write == 0


def test_shards_hold_what_the_manifest_says(finished):
    cache = TeacherCache.open(finished)

    assert cache.manifest.samples_per_shard == 3
    assert [shard["number"] for shard in cache.shards] == [0, 1, 2, 3]
    assert cache.manifest.parts == {"trunk": [64, 32]}
    assert load_file(finished / "shards" / "00003.safetensors")["trunk.values"].shape == (1, 64, 32)
    assert set(cache.manifest.versions) == {"efficientsam3-hf", "transformers", "torch"}


# Interrupted and resumed.

RUN = """
import sys, time
from pathlib import Path
from accelerate import PartialState
from sam3_teachers import pictures, processor, tiny_teacher
from efficientsam3_hf.distillation import cache_writer
from efficientsam3_hf.distillation.cache_writer import CacheOptions, CacheWriter

photos, folder = sys.argv[1:]
PartialState(cpu=True)
whole = cache_writer.write_whole

def slow(path, data):
    whole(path, data)
    if path.parent.name == "shards":
        print("wrote", path.name, flush=True)
        time.sleep(60)  # to be killed in

cache_writer.write_whole = slow
options = CacheOptions(
    batch_size=2, num_workers=0, shard_megabytes=0.0075, codec="pca", rank=16, fit_samples=4
)
CacheWriter(folder, pictures(Path(photos)), processor(), tiny_teacher(), options).write()
"""


def test_killed_at_any_time_it_goes_on_to_the_same_bytes(photos, teacher, tmp_path):
    changes = {"codec": "pca", "rank": 16, "fit_samples": 4}
    writer(tmp_path / "whole", photos, teacher, **changes).write()
    tests = Path(__file__).parents[1]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent / "src"), str(tests)]),
    }  # fmt: skip
    command = [sys.executable, "-c", RUN, str(photos), str(tmp_path / "killed")]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("wrote 00000.safetensors"):  # but not yet what is said of it
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (tmp_path / "killed/shards/00001.safetensors.part").write_bytes(b"half a shard")
    with pytest.raises(CacheError, match=r"not finished: 0 of 2 shards.*Run the command"):
        TeacherCache.open(tmp_path / "killed")

    cache = writer(tmp_path / "killed", photos, teacher, **changes).write()

    assert len(cache) == COUNT
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("done", [0, 1, 2, 3, 4, 5, 6, 7, 8])
def test_wherever_writing_stops_nothing_is_lost_or_twice(
    photos, teacher, tmp_path, finished, monkeypatch, done: int
):
    whole, count = cache_files.write_whole, 0

    def stops(path: Path, data: bytes) -> None:
        nonlocal count
        if path.parent.name == "shards":
            if count == done:
                (path.parent).mkdir(parents=True, exist_ok=True)
                path.with_name(path.name + ".part").write_bytes(data[: len(data) // 2])
                raise KeyboardInterrupt
            count += 1
        whole(path, data)

    for module in ("cache_files", "cache_writer"):
        monkeypatch.setattr(f"efficientsam3_hf.distillation.{module}.write_whole", stops)
    making = writer(tmp_path / "cache", photos, teacher)
    if done < 8:
        with pytest.raises(KeyboardInterrupt):
            making.write()
    else:
        making.write()
    before = contents(tmp_path / "cache")
    monkeypatch.undo()

    resumed = writer(tmp_path / "cache", photos, teacher)
    missing = resumed.missing()
    resumed.write()

    assert len(missing) == 4 - done // 2
    after = contents(tmp_path / "cache")
    assert after == contents(finished)
    assert all(after[name] == data for name, data in before.items() if name.endswith(".json"))


def test_a_full_disk_loses_nothing(photos, teacher, tmp_path, finished, monkeypatch):
    real_open = open

    def full(path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        file = real_open(path, mode, *arguments, **named)
        if "w" in mode and "00002.safetensors" in str(path):

            class Full:
                def __enter__(self):
                    return self

                def __exit__(self, *error):
                    file.close()

                def write(self, data: bytes):
                    file.write(data[:100])
                    raise OSError(errno.ENOSPC, "No space left on device")

            return Full()
        return file

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(DiskFullError, match=r"no room for [\d,]+ bytes of .*00002.*is safe: make"):
        writer(tmp_path / "cache", photos, teacher).write()
    monkeypatch.undo()

    assert not list((tmp_path / "cache").rglob("*.part"))
    assert (tmp_path / "cache/shards/00001.json").is_file()
    cache = writer(tmp_path / "cache", photos, teacher).write()
    assert len(cache) == COUNT
    assert contents(tmp_path / "cache") == contents(finished)


LIMITED = """
import resource, sys
from pathlib import Path
from efficientsam3_hf.distillation.cache_files import DiskFullError, write_whole

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path(sys.argv[1])
write_whole(folder / "small", bytes(900))
try:
    write_whole(folder / "large", bytes(2000))
except DiskFullError as error:
    print(error)
print(sorted(path.name for path in folder.iterdir()))
"""


def test_a_real_limit_leaves_no_half_of_a_file(tmp_path):
    source = str(Path(__file__).parents[2] / "src")
    output = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()

    assert "no room for 2,000 bytes" in output[0]
    assert "All that was written" in output[0]
    assert output[1] == "['small']"


RANKS = """
import sys
from pathlib import Path
from sam3_teachers import pictures, processor, tiny_teacher
from efficientsam3_hf.distillation.cache_writer import CacheOptions, CacheWriter

photos, folder = map(Path, sys.argv[1:])
options = CacheOptions(batch_size=2, num_workers=0, shard_megabytes=0.0075)
making = CacheWriter(folder, pictures(photos), processor(), tiny_teacher(), options)
own = []
write_shard = making.write_shard
making.write_shard = lambda shard: (own.append(shard.number), write_shard(shard))
print(len(making.write()), own)
"""


def test_two_ranks_write_what_one_writes(photos, finished, tmp_path):
    outputs = run_ranks(RANKS, 2, (str(photos), str(tmp_path / "cache")))

    lines = [output.splitlines()[-1] for output in outputs]
    assert lines == [f"{COUNT} [0, 2]", f"{COUNT} [1, 3]"]
    assert contents(tmp_path / "cache") == contents(finished)


def test_two_runs_do_not_write_one_cache(photos, teacher, own):
    with (
        FileLock(own / ".lock"),
        pytest.raises(CacheError, match="Another process is writing the cache"),
    ):
        writer(own, photos, teacher)


# Damaged.


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", r"00001\.safetensors is damaged: it has [\d,]+ bytes instead of"),
        ("missing", r"00001\.safetensors is damaged: it is missing"),
        ("flipped", r"00001\.safetensors is damaged: its checksum is not"),
    ],
)
def test_a_damaged_shard_is_named_and_written_anew(
    photos, teacher, own, finished, damage: str, message: str
):
    path = own / "shards/00001.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:-10])
    elif damage == "missing":
        path.unlink()
    else:
        data[-100] ^= 1
        path.write_bytes(data)

    with pytest.raises(CacheError, match=f"{message}.*Delete it and run"):
        TeacherCache.open(own).read(["own/3.png"])  # the first of the second shard

    path.unlink(missing_ok=True)
    making = writer(own, photos, teacher)
    assert making.missing() == [1]
    making.write().verify()
    assert contents(own) == contents(finished)


def test_each_shard_is_verified_once(own, monkeypatch):
    cache = TeacherCache.open(own)
    sums = []
    checksum = cache_files.checksum
    monkeypatch.setattr(
        "efficientsam3_hf.distillation.teacher_cache.checksum",
        lambda path: (sums.append(path.name), checksum(path))[1],
    )
    for _ in range(2):
        copied = copy.deepcopy(cache)
        copied.verified = cache.verified  # shared among processes
        for key in cache:
            copied.read([key])

    assert sorted(sums) == [f"0000{number}.safetensors" for number in range(4)]


def test_a_damaged_basis_or_manifest_is_an_error_that_says_so(photos, teacher, tmp_path):
    folder = tmp_path / "cache"
    writer(folder, photos, teacher, codec="pca", rank=4).write()
    (folder / "codec.safetensors").write_bytes(b"no basis")
    with pytest.raises(CacheError, match=r"codec\.safetensors is missing or damaged"):
        TeacherCache.open(folder)

    (folder / "manifest.json").write_text("{")
    with pytest.raises(CacheError, match=r"manifest\.json is damaged"):
        TeacherCache.open(folder)
    with pytest.raises(CacheError, match="holds no teacher cache"):
        TeacherCache.open(tmp_path)


# Made otherwise.


def test_another_teacher_is_refused_by_name(photos, own):
    other = tiny_teacher(seed=1)

    with pytest.raises(CacheError, match=r"another teacher \(teacher fingerprint: [0-9a-f]+ there"):
        TeacherCache.open(own, teacher=other)
    with pytest.raises(CacheError, match=r"another teacher .*Give what it was made with"):
        writer(own, photos, other)


def test_another_transform_is_refused_by_name(photos, teacher, own):
    other = processor()
    other.image_mean = [0.485, 0.456, 0.406]

    message = r"another transform \(transform image_mean: \[0\.5.*there, \[0\.485.* here"
    with pytest.raises(CacheError, match=message):
        TeacherCache.open(own, transform=other)
    with pytest.raises(CacheError, match=message):
        CacheWriter(own, pictures(photos), other, teacher, options())


def test_another_dataset_or_order_is_refused_by_name(photos, teacher, own):
    for samples in (pictures(photos).shuffle(1), pictures(photos).select(range(9))):
        with pytest.raises(CacheError, match=r"another dataset \(dataset .*fingerprint"):
            TeacherCache.open(own, dataset=samples)
        with pytest.raises(CacheError, match="another dataset"):
            CacheWriter(own, samples, processor(), teacher, options())


def test_other_options_are_refused_by_name(photos, teacher, own):
    with pytest.raises(CacheError, match=r"another codec.*codec name: int8 there, pca here"):
        writer(own, photos, teacher, codec="pca", rank=4)
    with pytest.raises(CacheError, match=r"another kind, another flips.*flips: False there, True"):
        writer(own, photos, teacher, kind="levels", flips=True)
    half = load_teacher(teacher.detector, "bfloat16")
    with pytest.raises(CacheError, match="teacher dtype: float32 there, bfloat16 here"):
        writer(own, photos, half)
    assert TeacherCache.open(own, teacher=half)  # a student may be trained in any


def test_what_cannot_be_cached_says_so(photos, teacher, tmp_path):
    with pytest.raises(TypeError, match="not a SampleStream"):
        CacheWriter(tmp_path, pictures(photos).stream(), processor(), teacher, options())
    with pytest.raises(ValueError, match="no codec 'zip'"):
        writer(tmp_path, photos, teacher, codec="zip")
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(CacheError, match=r"not empty \(thesis\.tex\)"):
        writer(tmp_path, photos, teacher)
    twice = pictures(photos).select([0, 1, 1])
    with pytest.raises(CacheError, match=r"name twice, 1\.png"):
        CacheWriter(tmp_path / "twice", twice, processor(), teacher, options())


def test_broken_pictures_are_left_out_and_counted(photos, teacher, tmp_path, recwarn):
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    (folder / "3.png").write_bytes(b"no picture")

    cache = writer(tmp_path / "cache", folder, teacher).write()

    assert len(cache) == COUNT - 1
    assert "own/3.png" not in cache
    assert sum(shard["skipped"] for shard in cache.shards) == 1


# Read in training.


def collator(augment: Any = None) -> ImageCollator:
    return ImageCollator(processor(), augment=[] if augment is None else [augment])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_batches_bring_the_features_of_their_own_pictures(
    photos, teacher, finished, workers: int, streaming: bool
):
    samples: Any = pictures(photos).shuffle(3)
    samples = samples.stream() if streaming else samples
    cached = CachedTeacherFeatures(TeacherCache.open(finished, teacher, processor()), collator())
    loader = DataLoader(samples, batch_size=4, num_workers=workers, collate_fn=cached)

    count = 0
    for batch in loader:
        assert batch["teacher_features"]["trunk"]["values"].dtype == torch.int8
        features = decoded(batch, cached.cache)["trunk"]
        expected = teacher.features("trunk", batch["pixel_values"])["trunk"]
        assert (features - expected).norm() < 0.02 * expected.norm()
        count += len(features)
    assert count == COUNT


def test_unreadable_samples_bring_no_features(photos, teacher, finished):
    samples = pictures(photos)
    cached = CachedTeacherFeatures(TeacherCache.open(finished), collator())

    batch = cached([None, samples[2], None, samples[5]])

    assert len(batch["teacher_features"]["trunk"]["values"]) == len(batch["pixel_values"]) == 2


def test_flipped_pictures_bring_flipped_features(photos, teacher, tmp_path):
    cache = writer(tmp_path / "cache", photos, teacher, flips=True).write()
    augment = flips(0.5, seed=1)
    cached = CachedTeacherFeatures(cache, collator(augment))
    samples = [sample for sample in pictures(photos) if sample is not None]

    batch = cached(samples)

    flipped = [augment.choose(sample).flip for sample in samples]
    assert 0 < sum(flipped) < COUNT == len(cache)
    features = decoded(batch, cached.cache)["trunk"]
    for number, (sample, is_flipped) in enumerate(zip(samples, flipped, strict=True)):
        image = sample.image[:, ::-1].copy() if is_flipped else sample.image
        pixels = processor()(image, return_tensors="pt")["pixel_values"]
        expected = teacher.features("trunk", pixels)["trunk"][0]
        assert (features[number] - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    "augment",
    [
        flips(1.0),
        Augmentations(flip=0.0, scale=(1.3, 1.3), colour=0.0),
        Augmentations(flip=0.0, scale=(1.0, 1.0), colour=0.5),
    ],
)
def test_other_pixels_than_the_teachers_are_refused(photos, finished, augment):
    cached = CachedTeacherFeatures(TeacherCache.open(finished), collator(augment))
    samples = list(pictures(photos))

    with pytest.raises(CacheError, match=r"not the one that the teacher saw.*no change, as no fl"):
        cached(samples)


def test_pictures_of_another_folder_are_refused(teacher, finished, tmp_path):
    write_pictures(tmp_path, COUNT, seed=5)  # of the same names
    cached = CachedTeacherFeatures(TeacherCache.open(finished), collator())

    with pytest.raises(CacheError, match="not the one that the teacher saw"):
        cached(list(pictures(tmp_path)))


def test_an_unknown_picture_is_named(finished):
    with pytest.raises(CacheError, match=r"own/99\.png is not among the 10 pictures.*own/0\.png"):
        TeacherCache.open(finished).read(["own/99.png"])


def test_clips_are_cached_frame_by_frame(tmp_path):
    teacher = load_teacher(tiny_sam3_video(), "float32", with_tracker=True)
    clips = Clips(3, num_frames=4, side=112)
    for number in range(3):
        for index, frame in enumerate(clips[number].frames or []):
            write_image(tmp_path / f"videos/{number}/{index:03d}.png", frame)
    samples = load(OwnVideos(str(tmp_path / "videos"), cut=Cut(3, place="start")))
    cache = CacheWriter(
        tmp_path / "cache", samples, processor(), teacher, options(kind="clip", codec="fp16")
    ).write()
    cached = CachedTeacherFeatures(cache, ClipCollator(processor()))

    batch = cached([samples[2], samples[0]])

    assert len(cache) == 9
    assert "own/1#2" in cache
    frames = clip_frames(decoded(batch, cached.cache), clips=2)
    expected = teacher(lambda models: models.tracker.encode_clips(batch["pixel_values"]))
    for found, wanted in zip(frames, expected, strict=True):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=2**-10, atol=2**-10)
    other = load(OwnVideos(str(tmp_path / "videos"), cut=Cut(2, place="start")))
    with pytest.raises(CacheError, match=r"another dataset \(dataset cut"):
        TeacherCache.open(tmp_path / "cache", dataset=other)


def test_training_on_few_bytes_ends_where_training_on_many_does(photos, teacher, tmp_path):
    """Loss against the teacher's own features, of a student that saw only the cache's."""
    losses = {}
    pixels = torch.cat([seen(photos, f"own/{number}.png") for number in range(COUNT)])
    exact = teacher.features("trunk", pixels)["trunk"]
    keys = [f"own/{number}.png" for number in range(COUNT)]
    for name, changes in {"fp16": {}, "int8": {}, "pca": {"energy": 0.99}}.items():
        cache = writer(tmp_path / name, photos, teacher, codec=name, **changes).write()
        target = cache.decode(cache.read(keys, pixels))["trunk"]
        torch.manual_seed(0)
        student = torch.nn.Conv2d(3, 32, 14, stride=14)
        optimiser = torch.optim.Adam(student.parameters(), lr=3e-3)
        for step in range(60):
            loss = (student(pixels).flatten(2).transpose(1, 2) - target).square().mean()
            if step == 0:
                first = loss.item()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        tokens = student(pixels).flatten(2).transpose(1, 2)
        losses[name] = (tokens - exact).square().mean().item()
        assert losses[name] < 0.8 * first

    assert losses["int8"] == pytest.approx(losses["fp16"], rel=0.01)
    assert losses["pca"] == pytest.approx(losses["fp16"], rel=0.01)
