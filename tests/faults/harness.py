"""Faults on purpose: what trains, prices and is killed here are children of this process, forked when all is imported.

A fault is survived where the run goes on to the very bits of an unbroken one, or is refused in one line, as it should.
"""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # conftest's

import torch  # noqa: E402
from conftest import byte_tokenizer_json, hugging_face_model, tiny_config  # noqa: E402

import train  # noqa: E402
from common.cli import run_main  # noqa: E402
from pipeline import checkpoint  # noqa: E402
from pipeline.predictor import Predictor  # noqa: E402

STEPS = 6
CALLS = ("rename", "replace", "unlink", "rmdir", "fsync")  # all that a save does to names and to the disk
REFUSALS = ("has no run.json", "does not exist")  # of a run that was killed before its first checkpoint


@dataclass
class Place:
    """A tiny model, its data, and an unbroken run of STEPS steps with a save every second one"""

    folder: Path
    numbers: int = 0
    failures: list[str] = field(default_factory=list)
    tried: dict[str, list[int]] = field(default_factory=dict)  # kind -> survived, tried

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        hugging_face_model(tiny_config(vocab_size=256, tie_word_embeddings=True), self.folder / "model")
        (self.folder / "model" / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
        words, rng = {"tin": 8, "brass": 45, "silver": 260, "gold": 820}, random.Random(0)
        rows = [
            {"title": f"{word} {n}", "price": round(price * rng.uniform(0.9, 1.1), 2), "description": word}
            for n in range(60) for word, price in words.items()
        ]  # fmt: skip
        (self.folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
        started = time.perf_counter()
        code, said = self.train("whole")
        assert code == 0, said
        self.seconds = time.perf_counter() - started
        assert self.train("other", "--seed", "1")[0] == 0

    def new(self) -> str:
        self.numbers += 1
        return f"run{self.numbers}"

    def train(self, out: str, *more: str, before: Callable | None = None, kill_after: float | None = None) -> tuple:
        """(exit code, what was printed) of train.py; `before()` is called in the child, to break something"""
        given = ["--out", str(self.folder / out), "--device", "cpu", *more]
        if "--resume" not in more:
            given += ["--model", str(self.folder / "model"), "--data", str(self.folder / "items.jsonl"), "--bits", "4"]
            given += f"--max-steps {STEPS} --save-every 2 --batch-tokens 512 --max-tokens 120 --val-items 4".split()
            given += ["--dropout", "0.1", "--lr", "5e-3"]
        return self.child(lambda: train.main(train.training_options(train.__doc__, given)), before, kill_after)

    def resume(self, out: str) -> tuple:
        return self.train(out, "--resume")

    def predict(self, out: str) -> tuple:
        return self.child(lambda: Predictor(self.folder / out, torch.device("cpu"), torch.float32))

    def child(self, work: Callable, before: Callable | None = None, kill_after: float | None = None) -> tuple:
        """Exit code (or minus the signal) and output of `work()` in a process of its own"""
        said = self.folder / "said.txt"
        child = os.fork()
        if not child:
            code = 1
            try:
                with open(said, "w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # not pytest's
                    if before:
                        before()
                    run_main(work)
                    code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0
            except BaseException as error:
                os.write(2, f"\nTraceback: {error!r}\n".encode())
            finally:
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(Exception):
                        stream.flush()
                os._exit(code)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, said.read_text(errors="replace")

    def equal(self, out: str) -> bool:
        """Whether a run has ended with the bits of the unbroken one"""
        names = ("adapter_model.safetensors", "validation.safetensors")
        one, other = self.folder / "whole", self.folder / out
        same = all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
        return same and checkpoint.is_complete(other) and not list(other.glob(".*"))

    def note(self, kind: str, what: str, survived: bool, said: str = "") -> bool:
        """Count one fault; what was not survived is printed"""
        count = self.tried.setdefault(kind, [0, 0])
        count[0] += survived
        count[1] += 1
        if not survived:
            self.failures.append(f"{kind}: {what}: {' '.join(said[-300:].split())}")
        return survived

    def goes_on(self, kind: str, what: str, out: str) -> bool:
        """After a fault: `--resume` ends with the same bits, or there was no checkpoint yet and it says so"""
        code, said = self.resume(out)
        if code == 0:
            survived = self.equal(out)
        else:
            first = not (self.folder / out / "run.json").exists() and any(words in said for words in REFUSALS)
            survived = code == 2 and one_line(said) and first and self.train(out)[0] == 0 and self.equal(out)
        shutil.rmtree(self.folder / out, ignore_errors=True)
        return self.note(kind, what, survived, said)


def one_line(said: str) -> bool:
    """Whether output ends in an error of one line, without a traceback"""
    return said.strip().rpartition("\n")[2].startswith("error: ") and "Traceback" not in said


# ---- faults ---------------------------------------------------------------------------------------------------------


def kill_at_random(place: Place, kills: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    for _ in range(kills):
        out, after = place.new(), rng.uniform(0, place.seconds)
        place.train(out, kill_after=after)
        place.goes_on("killed at a random moment", f"after {after:.2f} s", out)


def nth_call(number: int, then: Callable) -> Callable:
    """For `before`: at the `number`th call of the second save that changes names or syncs, do `then(its name)`"""

    def install() -> None:
        saves, calls = [0], [0]
        plain = checkpoint.save

        def save(*given):
            saves[0] += 1
            plain(*given)
            saves[0] += 0.5

        checkpoint.save = save
        for name in CALLS:

            def counting(*given, name=name, call=getattr(os, name), **options):
                if saves[0] == 2.5:  # saves count 1, 1.5, 2.5, 3: the second one is under way
                    calls[0] += 1
                    if calls[0] - 1 == number:
                        then(f"{name} {' '.join(os.path.basename(str(x)) for x in given[:1])}")
                return call(*given, **options)

            setattr(os, name, counting)

    return install


def kill_at_each_point(place: Place, every: int = 1) -> None:
    """kill -9 before each call of the second save that changes a name or reaches the disk"""

    def die(name: str) -> None:
        os.write(1, f"\nkilled before {name}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    number = 0
    while True:
        out = place.new()
        code, said = place.train(out, before=nth_call(number, die))
        if code != -signal.SIGKILL:  # there are no more
            shutil.rmtree(place.folder / out, ignore_errors=True)
            place.note("killed at a point of a save", "never reached", number > 0 and code == 0, said)
            return
        place.goes_on("killed at a point of a save", said.strip().splitlines()[-1], out)
        number += every


def full_disk(place: Place, points: tuple = (0, 3, 8)) -> None:
    def full(name: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for number in points:
        out = place.new()
        code, said = place.train(out, before=nth_call(number, full))
        told = code == 2 and one_line(said) and f"error: {place.folder / out}" in said and ".saving" not in said
        told = told and "cannot be written: No space left" in said
        if place.note("full disk, said", f"call {number}", told, said):
            place.goes_on("full disk, gone on from", f"call {number}", out)


def nan_batch(place: Place) -> None:
    def break_one() -> None:
        plain, calls = train.training_step, [0]

        def step(*given):
            calls[0] += 1
            return plain(*given) * (torch.nan if calls[0] == 3 else 1)

        train.training_step = step

    out = place.new()
    code, said = place.train(out, before=break_one)
    place.note("NaN batch", "step 3", code == 0 and "step 3: loss nan" in said and place.predict(out)[0] == 0, said)


def changes_of(name: str, whole: bytes, other: bytes | None) -> dict[str, bytes | None]:
    """What a file may become: other bytes, or None, gone"""
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    changed = {"a flipped bit": flipped, "cut short": whole[:-1], "cut in half": whole[:half], "gone": None}
    changed |= {"zeros": bytes(len(whole)), "a byte more": whole + b"\n"}
    if other is not None and other != whole:
        changed["of another run"] = other
    return changed


def changed_files(place: Place, finished: bool) -> None:
    """Each change of each file of a run: refused by predict, or, of an unfinished run, by --resume"""
    kind = f"file of {'a finished' if finished else 'an unfinished'} run changed"
    source, out = place.folder / "whole", place.folder / place.new()
    for name in checkpoint.OWNED:
        if name == checkpoint.COMPLETE:
            continue
        other = (place.folder / "other" / name).read_bytes()
        for what, changed in changes_of(name, (source / name).read_bytes(), other).items():
            shutil.copytree(source, out)
            if not finished:
                (out / checkpoint.COMPLETE).unlink()
            (out / name).unlink()
            if changed is not None:
                (out / name).write_bytes(changed)
            code, said = place.predict(out.name) if finished else place.resume(out.name)
            place.note(kind, f"{name}: {what}", code == 2 and one_line(said), said)
            shutil.rmtree(out)


def base_replaced(place: Place) -> None:
    """Another model under the same name: refused by predict and by --resume"""
    out, model = place.new(), place.folder / "model"
    assert place.train(out)[0] == 0
    shutil.copytree(model, place.folder / "kept")
    hugging_face_model(tiny_config(vocab_size=256, tie_word_embeddings=True), model, 7)
    code, said = place.predict(out)
    place.note("base replaced", "predict", code == 2 and one_line(said), said)
    (place.folder / out / checkpoint.COMPLETE).unlink()
    code, said = place.resume(out)
    place.note("base replaced", "--resume", code == 2 and one_line(said), said)
    shutil.rmtree(model)
    shutil.move(place.folder / "kept", model)
