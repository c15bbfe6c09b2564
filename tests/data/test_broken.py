"""Records that cannot be used are noted by every process, once."""

import gc
import pickle

import pytest
from torch.utils.data import DataLoader

from efficientsam3_hf.data.broken import BrokenRecords
from efficientsam3_hf.data.loading import Reader, load


class Every(Reader):
    """Numbers, of which every third cannot be read."""

    def records(self):
        for number in range(12):
            yield str(number), {"number": number}

    def read(self, record):
        if record["number"] % 3 == 0:
            raise OSError("truncated")
        return record["number"]


def test_each_is_warned_of_once_with_a_count(package_log, caplog):
    broken = BrokenRecords()

    for name in ("a", "b", "a"):
        broken.add(name, ValueError("bad"))

    messages = [record.message for record in caplog.records]
    assert messages == [
        "Skipped record a (1 so far): ValueError: bad.",
        "Skipped record b (2 so far): ValueError: bad.",
    ]
    assert len(broken) == 2


def test_workers_note_what_they_skip_in_one_list():
    samples = load(Every())

    loader = DataLoader(samples, batch_size=None, num_workers=2)

    assert [number for number in loader if number is not None] == [1, 2, 4, 5, 7, 8, 10, 11]
    assert sorted(samples.broken.listed(), key=int) == ["0", "3", "6", "9"]


def test_all_are_listed_at_the_end_and_the_file_goes(package_log, caplog):
    broken = BrokenRecords()
    broken.add("a", ValueError("bad"))
    path = broken.path
    copied = pickle.loads(pickle.dumps(broken))  # as a worker gets it
    copied.add("b", OSError("worse"))
    del copied
    gc.collect()
    assert path.exists()
    caplog.clear()

    del broken
    gc.collect()

    (record,) = caplog.records
    assert record.message.startswith("Skipped records, since they cannot be used (2):")
    assert "a: ValueError: bad\n  b: OSError: worse" in record.message
    assert not path.exists()


def test_a_list_that_was_asked_for_is_logged_and_stays(tmp_path, package_log, caplog):
    path = tmp_path / "lists" / "broken.jsonl"
    list(load(Every(), broken_list=path))
    gc.collect()

    assert caplog.records[-1].message.startswith("Skipped records, since they cannot be used (4):")
    assert len(path.read_text().splitlines()) == 4


def test_a_missing_package_is_no_broken_record():
    class Needy(Every):
        def read(self, record):
            raise ImportError("install it")

    with pytest.raises(ImportError, match="install it"):
        list(load(Needy()))


def test_a_wrong_choice_is_an_error():
    with pytest.raises(ValueError, match='"skip" or "raise", not \'ignore\''):
        BrokenRecords("ignore")
