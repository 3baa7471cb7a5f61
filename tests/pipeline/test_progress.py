"""How far a run is: steps read one behind, what is written down, checks, and the end of a run that learns nothing.

    python -m pytest tests/pipeline/test_progress.py
"""

import math

import pytest
import torch

from pipeline.progress import BAD_STEPS, Progress, one_behind


def progress(total=100, log_every=1, counts=None, metrics=None):
    return Progress(total, torch.device("cpu"), log_every, counts, [] if metrics is None else metrics)


def test_each_item_is_given_after_the_next_one_has_started():
    events = []

    def started():
        for number in range(3):
            events.append(f"start {number}")
            yield number

    for number in one_behind(started()):
        events.append(f"read {number}")
    assert events == ["start 0", "start 1", "read 0", "start 2", "read 1", "read 2"]
    assert list(one_behind(iter([]))) == [] and list(one_behind(iter([5]))) == [5]


def test_what_a_step_gave_is_written_down():
    run = progress(total=5, log_every=2)
    for step in range(1, 6):
        run.report(step, 1e-3 * step, 100, 2.0 / step, 0.5, 0.1)
    assert [line["step"] for line in run.metrics] == [2, 4, 5]  # every second, and the last
    assert run.metrics[0] | {"peak_memory_gib": 0} == {
        "step": 2, "loss": 1.0, "lr": 2e-3, "grad_norm": 0.5, "tokens": 100, "tokens_per_second": 1000.0,
        "peak_memory_gib": 0,
    }  # fmt: skip
    assert run.step == 5 and run.tokens == 500 and run.seconds > 0


def test_a_resumed_run_counts_on():
    counts, metrics = {"step": 7, "seconds": 1000.0, "tokens": 70}, [{"step": 7, "val_mae_dollars": 5.0}]
    run = progress(counts=counts, metrics=metrics)
    assert run.bar.n == run.step == 7 and run.checks == [(5.0, 7)] and run.elapsed() >= 1000
    run.report(8, 1e-3, 10, 1.0, 1.0, 0.1)
    assert run.tokens == 80 and run.seconds >= 1000


def test_checks_tell_the_best_and_how_long_ago_it_was():
    run = progress()
    best = []
    for step, error in ((3, 40.0), (6, 30.0), (9, 35.0), (12, 31.0), (15, 20.0)):
        run.report(step, 1e-3, 10, 1.0, 1.0, 0.1)
        best.append((run.check(error, 20), run.since_best()))
    assert best == [(True, 0), (True, 0), (False, 1), (False, 2), (True, 0)]
    assert run.checks == [(40.0, 3), (30.0, 6), (35.0, 9), (31.0, 12), (20.0, 15)]
    assert "off by $20.00 on 20 validation items" in run.note


def test_an_error_as_small_as_the_best_is_not_better():
    run = progress()
    for step, expected in ((1, True), (2, False)):
        run.report(step, 1e-3, 10, 1.0, 1.0, 0.1)
        assert run.check(5.0, 20) is expected
    assert run.since_best() == 1


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_ten_steps_in_a_row_without_a_finite_loss_end_the_run(loss, norm, capsys):
    run = progress()
    for step in range(1, BAD_STEPS):
        run.report(step, 1e-3, 10, loss, norm, 0.1)
    assert run.metrics[-1]["loss"] is None and run.metrics[-1]["grad_norm"] is None  # NaN is no JSON
    run.report(BAD_STEPS, 1e-3, 10, 1.0, 1.0, 0.1)  # one that is finite: they are counted anew
    for step in range(BAD_STEPS + 1, 2 * BAD_STEPS):
        run.report(step, 1e-3, 10, loss, norm, 0.1)
    with pytest.raises(ValueError, match="ten steps in a row without a finite loss: lower --lr"):
        run.report(2 * BAD_STEPS, 1e-3, 10, loss, norm, 0.1)
    assert "step 1: loss" in capsys.readouterr().err
