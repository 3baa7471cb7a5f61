"""What a run survives: changed files, signals, a second run, the user's own files, odd mounts; and what it says.

    python -m pytest tests/pipeline/test_survival.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file
from trained_run import CACHE, ROOT, run, seal_again

from common.locks import held
from common.manifest import MANIFEST
from pipeline.checkpoint import OWNED, is_complete, open_run
from pipeline.options import training_options
from pipeline.progress import Progress

FAST = ["--val-items", "4", "--batch-tokens", "1024", "--max-tokens", "140", "--dtype", "fp32"]


def train_on(place, *options):
    return ["train.py", "--model", place / "model", "--data", place / "items.jsonl", *FAST, *options]


# ---- files of a checkpoint that are not what was saved ------------------------------------------------------------


@pytest.mark.parametrize("name", OWNED)
def test_no_change_of_a_file_passes_in_silence(place, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(place / "out", out)
    assert open_run(out)["steps"] and is_complete(out)
    whole = (out / name).read_bytes()
    middle = len(whole) // 2
    changes = {"flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], "cut": whole[:-1]}
    for changed in (*changes.values(), b"", None):
        if changed is None:
            (out / name).unlink()
            if name.endswith("complete"):  # it says that there is more to do
                assert not is_complete(out)
                continue
        else:
            (out / name).write_bytes(changed)
        if name.endswith("complete") and changed == whole[:-1]:  # its line end
            continue
        with pytest.raises(ValueError, match=name) as error:
            open_run(out)
            is_complete(out)
        assert "\n" not in str(error.value)


def test_every_command_refuses_a_changed_checkpoint(place, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(place / "out", out)
    seal_again(out)  # not complete, for --resume
    data = bytearray((out / "head.safetensors").read_bytes())
    data[-1] ^= 64
    (out / "head.safetensors").write_bytes(bytes(data))
    merge = ["-m", "lora.merge", "--ckpt", out, "--base", place / "model", "--out", tmp_path / "m"]
    resume = ["train.py", "--resume", "--out", out]
    start = ["train.py", "--start-from", out, "--data", place / "items.jsonl", "--out", tmp_path / "o"]
    for command in (["predict.py", "--ckpt", out, "gold"], ["evaluate.py", "--ckpt", out], merge, resume, start):
        _, err = run(*command, code=2)
        last = err.strip().splitlines()[-1]
        assert last.startswith("error: ") and "head.safetensors has changed since it was saved" in last, command
    assert not (tmp_path / "m").exists() and not (tmp_path / "o").exists()


def test_a_run_of_before_manifests_still_opens(place, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(place / "out", out)
    record = json.loads((out / "run.json").read_text())
    del record["manifest"]
    (out / "run.json").write_text(json.dumps(record))
    (out / MANIFEST).unlink()
    (out / "state" / "complete").write_text("")
    said, err = run("predict.py", "--ckpt", out, "gold")
    assert said.startswith("$") and MANIFEST not in err


# ---- signals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_is_the_same(place, tmp_path, number):
    common = train_on(place, "--max-steps", "30", "--epochs", "9", "--dropout", "0.1")
    if not (place / "unbroken").is_dir():
        run(*common, "--out", place / "unbroken")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "QLORA_CACHE": CACHE.name}
    command = [sys.executable, *map(str, [*common, "--out", tmp_path / "out"])]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    said = ""
    while "| 2/30 " not in said and "| 3/30 " not in said and "| 4/30 " not in said:
        letters = process.stderr.read(1)
        assert letters, said
        said += letters
    process.send_signal(number)
    said += process.stderr.read()
    process.stderr.close()
    assert process.wait() == 128 + number, said
    assert "finishing this step, then saving; once more ends at once" in said
    assert f"python train.py --resume --out {tmp_path / 'out'} goes on" in said.strip().splitlines()[-1]
    assert 0 < json.loads((tmp_path / "out" / "run.json").read_text())["steps"] < 30
    run("train.py", "--resume", "--out", tmp_path / "out")
    for name in ("adapter_model.safetensors", "head.safetensors"):
        ended = [load_file(out / name) for out in (place / "unbroken", tmp_path / "out")]
        assert all((ended[0][key] == ended[1][key]).all() for key in ended[0])


# ---- who owns what --------------------------------------------------------------------------------------------------


def test_a_second_run_into_one_directory_is_refused_and_nothing_is_touched(place, tmp_path):
    (tmp_path / "out").mkdir()
    with held(tmp_path / "out" / ".lock", "x"):
        _, err = run(*train_on(place, "--out", tmp_path / "out"), code=2)
        assert f"out is being trained by process {os.getpid()} (" in err.strip().splitlines()[-1]
        assert os.listdir(tmp_path / "out") == [".lock"]


def test_the_users_own_files_and_reports_survive_training_again(place, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(place / "out", out)
    (out / "thesis.txt").write_text("mine")
    (out / "members" / "1").mkdir(parents=True)
    (out / "members" / "1" / "note").write_text("mine")
    shutil.copy(out / "run.json", out / "members" / "1")  # of an ensemble that was there before
    shutil.move(out / "report", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "note").write_text("mine")
    (out / "report").symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere" / "metrics.json").read_text()
    run(*train_on(place, "--max-steps", "2", "--save-every", "1", "--head", "none", "--out", out))
    assert (out / "thesis.txt").read_text() == "mine" == (out / "members" / "1" / "note").read_text()
    assert (out / "report").is_symlink() and not (out / "head.safetensors").exists()
    assert not (out / "members" / "1" / "run.json").exists()
    _, err = run("evaluate.py", "--ckpt", out, "--quiet", "--no-untuned", "--items", "5")
    assert "report was a symbolic link" in err and (tmp_path / "elsewhere" / "note").read_text() == "mine"
    assert (tmp_path / "elsewhere" / "metrics.json").read_text() == before
    (out / "report" / "note").write_text("mine")
    run("evaluate.py", "--ckpt", out, "--quiet", "--no-untuned", "--items", "5")
    assert (out / "report" / "note").read_text() == "mine" and not list(out.glob(".*")) + list(tmp_path.glob(".*"))


# Beginning of a script: a mount on which directories cannot be synced and modes cannot be changed.
MOUNT = """
import errno, os, pathlib, stat, sys
real = os.fsync
def fsync(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    real(descriptor)
def chmod(self, mode, **more):
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(self))
os.fsync, pathlib.Path.chmod = fsync, chmod
"""
TRAIN = "import train; from common.cli import run_main\n"
TRAIN += "run_main(lambda: train.main(train.training_options(train.__doc__)))"


def test_the_current_directory_on_an_odd_mount_is_trained_into(place, tmp_path):
    (tmp_path / "here").mkdir()
    here = f"import os, sys; sys.path.insert(0, os.getcwd()); os.chdir({str(tmp_path / 'here')!r})\n"
    run("-c", here + MOUNT + TRAIN, *train_on(place, "--max-steps", "2", "--out", ".")[1:])
    assert open_run(tmp_path / "here")["steps"] == 2 and is_complete(tmp_path / "here")


def test_a_report_that_cannot_be_written_is_named_after_the_figures(place, tmp_path):
    shutil.copytree(place / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "report")
    (tmp_path / "out" / "report").write_text("a file")
    out, err = run("evaluate.py", "--ckpt", tmp_path / "out", "--quiet", "--no-untuned", "--items", "5", code=2)
    assert "5 held-out items" in out and f"{tmp_path / 'out' / 'report'} cannot be written: " in err


# ---- nothing learnt -----------------------------------------------------------------------------------------------


def test_a_run_that_learnt_nothing_says_so(place, tmp_path):
    broken = "import train, torch; plain = train.training_step\n"
    broken += "train.training_step = lambda *given: plain(*given) * torch.nan\n"
    _, err = run("-c", broken + TRAIN, *train_on(place, "--max-steps", "3", "--out", tmp_path / "out")[1:], code=2)
    assert "nothing was learnt: none of the 3 steps had a finite loss" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("price, bound", [(999.49, "$999"), (0.5, "$1")])
def test_guesses_that_all_lie_at_a_bound_are_called_nothing_learnt(price, bound, capsys):
    progress = Progress(4, None, 1, {"step": 2, "seconds": 1.0, "tokens": 5, "finite": 1}, [])
    calibration = {"price": np.array([20.0, 300.0]), "digits": np.log(np.full((2, 21), price))}
    progress.check(5.0, 2, calibration)
    progress.judge()
    assert f"nothing was learnt: every validation item is guessed at {bound}" in capsys.readouterr().out
    progress.check(5.0, 2, calibration | {"digits": np.log([[price] * 21, [30.0] * 21])})
    progress.last_loss = float("nan")
    progress.judge()
    said = capsys.readouterr().out
    assert "every validation item" not in said and "the last step's loss is nan" in said


@pytest.mark.parametrize(
    "given",
    ["--alpha nan", "--alpha inf", "--weight-decay nan", "--weight-decay=-1", "--epochs 1e6", "--size 1000000000000",
     "--accumulate 1000000000", "--rank 1000000000", "--members 100000", "--batch-tokens 1000000000000", "--lr nan"],
)  # fmt: skip
def test_absurd_numbers_are_refused_at_once(given, capsys):
    with pytest.raises(SystemExit) as ended:
        training_options("Train.", given.replace("=", " ").split() if "=" not in given else [given])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert given.replace("=", " ").split()[0] in said
