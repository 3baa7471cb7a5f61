"""Break runs on purpose and count what survives: kills, changed files, a full disk, a NaN batch, another base.

    python -m tests.faults --kills 50

Minutes on a CPU; exit code 1 where anything did not survive. tests/faults/test_faults.py is a short version.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.faults import harness


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="kills at random moments (default: 50)")
    parser.add_argument("--every", type=int, default=1, help="of the points of a save, each so manieth (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = harness.Place(Path(folder))
        harness.kill_at_random(place, args.kills, args.seed)
        harness.kill_at_each_point(place, args.every)
        harness.changed_files(place, finished=True)
        harness.changed_files(place, finished=False)
        harness.full_disk(place)
        harness.nan_batch(place)
        harness.base_replaced(place)
    for failure in place.failures:
        print(f"NOT SURVIVED  {failure}")
    print("survived / tried")
    for kind, (survived, tried) in place.tried.items():
        print(f"{survived:>8} / {tried:<6}{kind}")
    sys.exit(bool(place.failures))


if __name__ == "__main__":
    main()
