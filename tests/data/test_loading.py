"""Order, subsets, shares and resumption of records."""

import pickle
import sys

import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from efficientsam3_hf.data.loading import Choice, Reader, load
from efficientsam3_hf.data.sa1b import Sa1b, write_sa1b
from efficientsam3_hf.data.synthetic import Scenes


class Numbers(Reader):
    """Numbers, of which some cannot be read."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()):
        self.count, self.broken_ones = count, broken

    def records(self):
        for number in range(self.count):
            yield f"n{number}", {"number": number}

    def read(self, record):
        if record["number"] in self.broken_ones:
            raise ValueError("out of order")
        return record["number"]


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tars")
    scenes = Scenes(22, ask="anything", side=32)
    write_sa1b((scenes[index] for index in range(22)), folder, per_tar=4)
    return str(folder)


def streams(tars: str, **options):
    """A stream out of tars, and one out of a table."""
    return [load(Sa1b(tars), streaming=True, **options), load(Sa1b(tars), **options).stream()]


def names(samples) -> list[str]:
    return [sample.source_id for sample in samples]


EVERY = [f"sa_{number}" for number in range(22)]


def test_samples_by_number_and_as_a_stream_are_the_same(tars):
    by_number = load(Sa1b(tars))

    assert names(by_number) == by_number.names == EVERY
    assert by_number[-1].source_id == by_number[21].source_id == "sa_21"
    for stream in streams(tars):
        assert names(stream) == EVERY
    with pytest.raises(IndexError, match="no record 22 among 22"):
        by_number[22]


def test_select_and_shuffle_keep_every_sample_once(tars):
    samples = load(Sa1b(tars))

    shuffled = samples.shuffle(seed=3)

    assert names(shuffled) != EVERY
    assert sorted(names(shuffled)) == sorted(EVERY)
    assert names(shuffled) == names(samples.shuffle(seed=3)) != names(samples.shuffle(seed=4))
    assert names(samples.select([5, 2])) == ["sa_5", "sa_2"]


@pytest.mark.parametrize("kind", [0, 1])
def test_each_epoch_of_a_stream_has_another_order(tars, kind: int):
    stream = streams(tars)[kind].shuffle(seed=1, buffer_size=3)
    first, again = names(stream), names(stream)

    stream.set_epoch(1)

    assert first == again != names(stream)
    assert sorted(first) == sorted(names(stream)) == sorted(EVERY)
    assert names(streams(tars)[kind].shuffle(seed=2, buffer_size=3)) != first


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("done", [0, 1, 7, 21, 22])
def test_a_resumed_stream_goes_on_where_it_was(tars, kind: int, done: int):
    stream = streams(tars)[kind].shuffle(seed=1, buffer_size=3)
    stream.set_epoch(5)
    iterator = iter(stream)
    for _ in range(done):
        next(iterator)
    state = stream.state_dict()
    rest = names(iterator)

    resumed = streams(tars)[kind].shuffle(seed=1, buffer_size=3)
    resumed.load_state_dict(state)

    assert resumed.state_dict() == state
    assert names(resumed) == rest
    assert len(rest) == 22 - done


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_share_the_samples_out(tars, kind: int, world_size: int, workers: int):
    seen = []
    for rank in range(world_size):
        stream = streams(tars)[kind].shuffle(seed=1).split(rank, world_size)
        loader = DataLoader(stream, batch_size=None, num_workers=workers)
        seen += names(loader)

    assert sorted(seen) == sorted(EVERY)


@pytest.mark.parametrize("kind", [0, 1])
def test_a_part_of_a_stream_leaves_the_whole_as_it_is(tars, kind: int):
    whole = streams(tars)[kind]

    parts = [whole.split(rank, 2) for rank in range(2)]
    shuffled = whole.shuffle(seed=1, buffer_size=3)
    shuffled.set_epoch(4)

    assert sorted(names(parts[0]) + names(parts[1])) == sorted(EVERY)
    assert names(whole) == EVERY != names(shuffled)
    assert int(whole.epoch) == 0


# torchdata 0.11 calls what torch 2.15 has deprecated. Can go when it does so no more.
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(("workers", "done"), [(0, 4), (2, 1), (2, 7)])
def test_a_loader_with_states_goes_on_in_mid_epoch(tars, kind: int, workers: int, done: int):
    def begin() -> StatefulDataLoader:
        stream = streams(tars)[kind].shuffle(seed=1, buffer_size=3).split(1, 2)
        stream.set_epoch(2)
        return StatefulDataLoader(stream, batch_size=None, num_workers=workers)

    whole = names(begin())
    loader = begin()
    iterator = iter(loader)
    first = [next(iterator).source_id for _ in range(done)]
    state = pickle.loads(pickle.dumps(loader.state_dict()))  # as accelerate keeps it
    del iterator

    resumed = begin()
    resumed.load_state_dict(state)

    assert first + names(resumed) == whole
    assert names(resumed) == whole  # the next epoch begins at its beginning


@pytest.mark.parametrize("world_size", [4, 5])
def test_a_number_of_tars_that_ranks_do_not_divide_is_shared_out_and_resumed(tars, world_size: int):
    seen = []
    for rank in range(world_size):
        stream = load(Sa1b(tars), streaming=True).shuffle(seed=1, buffer_size=3)
        part = stream.split(rank, world_size)
        whole = names(part)
        iterator = iter(part)
        first = [next(iterator).source_id]
        resumed = stream.split(rank, world_size)
        resumed.load_state_dict(part.state_dict())
        assert first + names(resumed) == whole
        seen += whole

    assert sorted(seen) == sorted(EVERY)


def test_ranks_share_samples_by_number(tars):
    samples = load(Sa1b(tars)).shuffle(seed=0)

    parts = [names(samples.split(rank, 4)) for rank in range(4)]

    assert sorted(name for part in parts for name in part) == sorted(EVERY)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_epoch_reaches_workers_that_stay(tars):
    stream = load(Sa1b(tars), streaming=True).shuffle(seed=1, buffer_size=4)
    loader = DataLoader(stream, batch_size=None, num_workers=1, persistent_workers=True)
    first = names(loader)

    stream.set_epoch(1)

    assert names(loader) != first
    stream.set_epoch(0)
    assert names(loader) == first


def test_a_fraction_is_the_same_however_it_is_read(tars):
    half = names(load(Sa1b(tars), fraction=0.5))

    assert 4 < len(half) < 18
    for stream in streams(tars, fraction=0.5):
        assert names(stream) == half
    assert names(load(Sa1b(tars), fraction=0.5, subset_seed=1)) != half
    assert set(names(load(Sa1b(tars), fraction=0.3))) < set(half)


def test_a_hundredth_of_many_is_about_a_hundredth():
    chosen = sum(f"sa_{number}" in Choice(0.01) for number in range(40_000))

    assert 340 < chosen < 460
    with pytest.raises(ValueError, match="at most 1, not 2"):
        Choice(2)


def test_records_can_be_chosen_by_name(tars):
    assert names(load(Sa1b(tars), names=["sa_3", "sa_20"])) == ["sa_3", "sa_20"]
    with pytest.raises(ValueError, match="no records, or none that were chosen"):
        load(Sa1b(tars), names=["sa_99"])


def test_what_cannot_be_read_is_none_by_number_and_left_out_in_order():
    samples = load(Numbers(6, broken=(1, 4)))

    assert list(samples) == list(samples.stream()) == [0, 2, 3, 5]
    assert [samples[number] for number in range(6)] == [0, None, 2, 3, None, 5]
    assert samples.broken.listed() == {
        "n1": "ValueError: out of order",
        "n4": "ValueError: out of order",
    }


def test_a_resumed_stream_counts_what_it_skipped():
    stream = load(Numbers(8, broken=(1, 2))).stream()
    iterator = iter(stream)
    assert [next(iterator), next(iterator)] == [0, 3]

    resumed = load(Numbers(8, broken=(1, 2))).stream()
    resumed.load_state_dict(stream.state_dict())

    assert list(resumed) == [4, 5, 6, 7]


def test_the_first_that_cannot_be_read_stops_a_strict_dataset():
    samples = load(Numbers(3, broken=(1,)), on_error="raise")

    with pytest.raises(ValueError, match="Record n1 cannot be used: ValueError: out of order"):
        list(samples)


def test_without_datasets_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)

    with pytest.raises(ImportError, match=r"efficientsam3-hf\[train\]"):
        load(Numbers(3))
