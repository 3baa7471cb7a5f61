"""Parts of the scripts that need no run: options, rates, members, the mean of predictions, the ablation."""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from evaluate import blended
from pipeline.options import peak_rate, training_options
from pipeline.prediction import Prediction
from pipeline.predictor import Predictor
from pricing.data.batch import shape_of
from pricing.data.prompt import Example
from train import learning_rate, start_steps

ROOT = Path(__file__).resolve().parents[2]


def test_the_blend_is_a_weighted_mean_in_log_price():
    expected = 100**0.65 * 200**0.175 * 50**0.175
    np.testing.assert_allclose(blended(np.array([100.0]), np.array([200.0]), np.array([50.0])), [expected])


def test_the_rate_of_a_run():
    assert [learning_rate(p, 2.0, "linear", 0.2) for p in (0.0, 0.1, 0.2, 0.6, 1.0)] == [0, 1, 2, 1, 0]
    assert learning_rate(0.6, 2.0, "cosine", 0.2) == pytest.approx(1) and learning_rate(0.4, 2.0, "constant", 0.2) == 2
    assert learning_rate(0.4, 2.0, "cosine", 0.2) == pytest.approx(1 + math.sqrt(0.5))


def test_each_step_is_taken_at_the_rate_of_its_middle():
    """Ten steps with a warm-up of two: a quarter and three quarters of the peak, then down; no rate is 0. Two batches a
    step, the last of which is short."""
    args = argparse.Namespace(max_minutes=None, accumulate=2, lr=4.0, schedule="linear", warmup=0.2)
    examples = [Example([1] * 5, [2, 3], 1.0)] * 3
    shape, seen = shape_of(examples, 20), []

    def take_step(window, rate):
        seen.append((len(window), rate))
        return lambda: None

    progress, stop = argparse.Namespace(step=0, total=10), argparse.Namespace(signal=None)
    started = list(start_steps(args, take_step, iter([examples] * 19), shape, progress, stop, 10))
    rates = [1.0, 3.0, *(4 * (1 - (number - 0.5 - 2) / 8) for number in range(3, 11))]
    assert [number for number, *_ in started] == list(range(1, 11))
    assert [rate for _, rate, *_ in started] == pytest.approx(rates) == [rate for _, rate in seen]
    assert [size for size, _ in seen] == [2] * 9 + [1] and [tokens for *_, tokens, _ in started] == [36] * 9 + [18]
    progress.step = 4  # a resumed run, and a segment: from the fifth to the seventh
    part = list(start_steps(args, take_step, iter([examples] * 19), shape, progress, stop, 7))
    assert [(number, rate) for number, rate, *_ in part] == [(n, pytest.approx(rates[n - 1])) for n in (5, 6, 7)]
    stop.signal = 15
    assert not list(start_steps(args, take_step, iter([examples] * 19), shape, progress, stop, 7))


def test_three_predictions_count_alike(monkeypatch):
    three = object.__new__(Predictor)
    three.paths, three.heads, three.active, three.model, three.tree = list("abc"), [None] * 3, 0, None, None
    three.seals = list("abc")
    monkeypatch.setattr("pipeline.predictor.load_adapter", lambda model, path: None)
    monkeypatch.setattr("pipeline.predictor.seal_of", str)
    each = iter([1.0, 2.0, 6.0])

    def fake(model, tree, prompts, head, *, batch_tokens, prune, on_batch):
        found = Prediction(*[np.full((2, 2), next(each))] * 2)
        if on_batch:
            on_batch([1], Prediction(found.distribution[1:], found.digits[1:]))
        return found

    seen = []
    monkeypatch.setattr("pipeline.predictor.predict", fake)
    found = three.predict([[1], [2]], on_batch=lambda indices, part: seen.append(part.digits))
    np.testing.assert_allclose(found.digits, 3)
    np.testing.assert_allclose(seen, [[[3, 3]]])


def test_further_members_take_over_the_numerics_of_the_first(monkeypatch, tmp_path):
    seen, numerics, o = [], {"optimiser": "sgd", "head8": True}, str(tmp_path / "o")
    monkeypatch.setattr("train.train", lambda args, plan=None: seen.append((args.out, args.seed, plan)))
    monkeypatch.setattr("pipeline.claim.read_run", lambda ckpt: {"plan": numerics})
    train.main(training_options("", ["--members", "3", "--out", o]))
    assert seen == [(o, 0, None), (f"{o}/members/1", 1, numerics), (f"{o}/members/2", 2, numerics)]


@pytest.mark.parametrize("warmup", ["-0.1", "1", "1.5", "nan"])
def test_a_warm_up_that_never_ends_is_refused(warmup, capsys):
    with pytest.raises(SystemExit):
        training_options("", ["--warmup", warmup])
    assert "--warmup is a share of the run, from 0 to less than 1" in capsys.readouterr().err


def test_an_ablations_row_that_is_worse_stands_above_the_first(monkeypatch, tmp_path):
    from benchmarks import ablation

    def measured(out, training, rows, split, gpu, done):
        for name, row in rows.items():
            report = ablation.report_of(out.parent, name)
            report.mkdir(parents=True)
            lines = [f"{n},part {n},10,{10 + float(row[1])},1,20,{row[1]},red" for n in range(9)]
            header = "id,title,truth,guess,low,high,error,colour"
            (report / "predictions.csv").write_text("\n".join([header, *lines]) + "\n")
            done(name, dict(mae=float(row[1]), rmsle=0, hits=0, coverage=0, train_seconds=0))

    (tmp_path / "rows.json").write_text('{"good": ["--lr", "1"], "bad": ["--lr", "4"]}')
    monkeypatch.setattr(ablation, "measure", measured)
    monkeypatch.setattr(
        sys, "argv", ["ablation", "--rows", str(tmp_path / "rows.json"), "--out", str(tmp_path / "out")]
    )
    ablation.main()
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert table["bad"]["against_first"]["difference"] == 3 and "against_first" not in table["good"]


def test_the_rate_falls_with_the_models_width():
    """SmolLM2-135M, Gemma 3 270M, Qwen2.5 0.5B and 1.5B, Llama 3.2 1B, Llama 3.1 8B"""
    assert [peak_rate(width) for width in (576, 640, 896, 1536, 2048, 4096)] == [2e-3, *[5e-4] * 3, 1e-4, 1e-4]


def test_checkpoints_that_would_not_be_kept_are_refused(capsys):
    with pytest.raises(SystemExit):
        training_options("", ["--keep", "best", "--save-every", "2"])
    assert "--keep best saves at every best check, and only there; leave out --save-every" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "visible", "wanted"),
    [
        (0, None, [None] * 3), (1, None, list("000")), (1, "", list("000")), (1, "GPU-a", ["GPU-a"] * 3),
        (2, None, list("010")), (2, "5,3", list("535")),
    ],
)  # fmt: skip
def test_the_jobs_of_an_ablation_share_the_gpus_in_turn(count, visible, wanted, monkeypatch):
    from benchmarks import ablation

    monkeypatch.setattr(ablation.torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [ablation.gpu_of(number) for number in range(3)] == wanted


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.json")))
def test_every_row_of_the_ablations_is_made_of_options_that_there_are(file):
    from benchmarks.ablation import options_of

    for name, row in json.loads(file.read_text()).items():
        training, evaluating = options_of(row)
        training_options("", training)
        assert not evaluating or evaluating[0] in ("--decode", "--baselines"), name
