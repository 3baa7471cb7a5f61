"""Ctrl-C and SIGTERM (a batch system's "your time is up"): finish what is at hand, save, and go; twice, at once.

    with Stop("finishing this step, then saving") as stop:
        while ... and not stop.signal:
            ...
    stop.leave("train.py --resume goes on")        # exit code 130 or 143, where there was a signal
"""

import os
import signal
import sys
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """While it is entered, the first signal is noted in `signal`, the second does what it always does."""

    def __init__(self, doing: str):
        self.doing, self.signal, self.before = doing, None, {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # no other may
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self.signal = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)  # of a second one the process dies, as it would without this class
        os.write(2, f"\n{self.doing}; once more ends at once\n".encode())  # print is not for signal handlers

    def leave(self, how_to_go_on: str) -> None:
        """End the process where there was a signal, with the exit code that says so"""
        if self.signal:
            print(f"stopped    {how_to_go_on}", file=sys.stderr)
            sys.exit(128 + self.signal)
