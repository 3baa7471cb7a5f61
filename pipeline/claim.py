"""Before a run is trained: its directory is there, is ours, is nobody else's, and holds nothing half-written."""

import argparse
import gc
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator

import torch

from common.files import SAVING, recover
from common.locks import clear, held
from pipeline.checkpoint import member_path, read_run
from pipeline.options import LOSSES


@contextmanager
def claimed(args: argparse.Namespace) -> Iterator[None]:
    """Hold --out for as long as this process trains into it, against any other; what a killed one left is settled.

    Raises ValueError or OSError now, not after hours of training, where `save` could not write there, or would replace
    what is no earlier run of train.py, and where the run to --resume was started with a loss that is gone.
    """
    if args.explain_memory:
        yield
        return
    out, busy = Path(args.out), f"{args.out} is being trained by"
    for directory in (out, *out.glob("members/[0-9]*")):
        recover(directory)
    mine = [name for name in os.listdir(out) if not name.startswith((".lock", SAVING))] if out.is_dir() else []
    if out.exists() and not args.resume and not (out / "run.json").is_file() and (mine or not out.is_dir()):
        raise ValueError(f"--out {out} exists and is no earlier run of train.py; choose another name")
    made = not out.exists()
    try:
        if not args.resume:
            out.mkdir(parents=True, exist_ok=True)
        elif not (out / "run.json").is_file():
            read_run(out)  # says what is the matter
        with held(out / ".lock", busy):
            for directory in (out, *out.glob("members/[0-9]*")):
                clear(directory, SAVING, least_age=0)
            if args.resume:
                loss = read_run(out)["options"].get("loss", "answer")
                if loss not in LOSSES:
                    gone = f"{out} was started with --loss {loss}, which is gone"
                    raise ValueError(f"{gone}: train again with {', '.join(LOSSES)}")
            yield
    except OSError as error:
        if error.filename is None or Path(error.filename) not in (out, out / ".lock"):
            raise
        raise OSError(f"{out} cannot be written: {error.strerror}") from None
    finally:
        if made:
            with suppress(OSError):
                out.rmdir()  # where nothing has been saved


def members(args: argparse.Namespace) -> Iterator[tuple[argparse.Namespace, dict | None]]:
    """The options of each member of the run, from one seed after the other, and what memory decided of the first one's
    numbers: those stay."""
    options = vars(args) | (read_run(args.out)["options"] if args.resume else {})
    for number in range(options["members"]):
        out, start = member_path(args.out, number), options["start_from"]
        going_on = args.resume and (out / "run.json").is_file()
        chosen = options | {"out": str(out), "device": args.device, "resume": going_on}
        chosen |= {"seed": options["seed"] + number, "start_from": start and str(member_path(start, number))}
        chosen |= {"members": 1 if number else options["members"]}
        if options["members"] > 1:
            print(f"member     {number + 1} of {options['members']}")
        earlier = read_run(args.out) if number or going_on else {}  # of the same run: its numerics stay
        yield argparse.Namespace(**chosen), earlier.get("plan")
        gc.collect()  # what one member took of the memory, the plan of the next may use
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
