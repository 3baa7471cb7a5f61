"""Locks that say who holds them, and signals that let a program finish what is at hand.

    python -m pytest tests/common/test_locks.py
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common import locks
from common.locks import held

ROOT = Path(__file__).resolve().parents[2]
HOLDS = """
import sys, time
from common.locks import held
with held(sys.argv[1], "x"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/lock"""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "lock")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_held_lock_is_refused_and_names_its_process(tmp_path, holder):
    with pytest.raises(ValueError, match=rf"^out is written by process {holder.pid} \(-c .*; wait for it") as error:
        with held(tmp_path / "lock", "out is written by"):
            pass
    assert "\n" not in str(error.value) and "stopped" not in str(error.value)
    assert json.loads((tmp_path / "lock").read_text())["pid"] == holder.pid


def test_a_stopped_holder_is_called_stopped_and_waited_for_aloud(tmp_path, holder, capsys):
    os.kill(holder.pid, signal.SIGSTOP)
    threading.Timer(1, holder.kill).start()
    with held(tmp_path / "lock", "the model is made by", wait=True):
        pass
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"waiting: the model is made by process {holder.pid}" in said
    assert f"which is stopped (kill -CONT {holder.pid} lets it go on)" in said


def test_a_killed_holders_lock_is_free_and_a_released_one_is_gone(tmp_path, holder):
    holder.kill()
    holder.wait()
    with held(tmp_path / "lock", "x"):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_where_there_are_no_locks_the_named_process_is_asked_for(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    with pytest.raises(ValueError, match=f"process {holder.pid}"):
        with held(tmp_path / "lock", "x"):
            pass
    holder.kill()
    holder.wait()
    with held(tmp_path / "lock", "x"):
        pass
    (tmp_path / "lock").write_text("[]")  # of anything else
    with held(tmp_path / "lock", "x"):
        pass


def test_one_at_a_time(tmp_path):
    inside, most = 0, 0

    def work():
        nonlocal inside, most
        for _ in range(5):
            with held(tmp_path / "lock", "x", wait=True):
                inside += 1
                most = max(most, inside)
                time.sleep(0.002)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and not list(tmp_path.iterdir())


WORKS = """
import time
from common.stop import Stop
with Stop("finishing") as stop:
    print("at work", flush=True)
    while not stop.signal:
        time.sleep(0.01)
    print("saved", flush=True)
    time.sleep(60 * HANG)
    stop.leave("--resume goes on")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("twice", [False, True])
def test_the_first_signal_lets_it_finish_and_the_second_ends_it(number, twice):
    process = subprocess.Popen(
        [sys.executable, "-c", WORKS.replace("HANG", str(int(twice)))], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "at work\n"
    process.send_signal(number)
    assert process.stdout.readline() == "saved\n"
    if twice:
        process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert "finishing; once more ends at once" in said
    assert process.returncode == (-number if twice else 128 + number)
    assert ("stopped    --resume goes on" in said) != twice
