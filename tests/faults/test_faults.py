"""A short version of `python -m tests.faults --kills 50`.

    python -m pytest tests/faults
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import harness


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return harness.Place(tmp_path_factory.mktemp("faults"))


def test_runs_that_are_killed_go_on_to_the_same_bits(place):
    harness.kill_at_random(place, 2)
    harness.kill_at_each_point(place, every=12)
    assert not place.failures and place.tried["killed at a point of a save"][1] >= 3


def test_no_changed_file_passes_in_silence(place):
    harness.changed_files(place, finished=True)
    assert not place.failures and sum(tried for _, tried in place.tried.values()) > 50


def test_a_full_disk_is_said_and_gone_on_from_and_a_nan_batch_left_out(place):
    harness.full_disk(place, points=(3,))
    harness.nan_batch(place)
    assert not place.failures
