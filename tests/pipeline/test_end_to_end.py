"""The three scripts as a user runs them, on a tiny random model: prices are learnt, numbers repeat, errors are one
line."""

import csv
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer_json, hugging_face_model, tiny_config
from safetensors.torch import load_file, save_file

from evaluate import BLEND
from pipeline.checkpoint import read_calibration
from pipeline.data import run_items
from pipeline.models import pick_dtype
from pipeline.prediction import last_states
from pipeline.predictor import Predictor
from pricing.curation.leaks import leaks
from pricing.data.items import items_from_rows, read_rows, sample, split_of
from pricing.data.prompt import encode_prompt
from pricing.distribution.intervals import cross_calibrated_range
from pricing.evaluation.baselines import BASELINES
from pricing.evaluation.metrics import bootstrap_interval

ROOT = Path(__file__).resolve().parents[2]
CACHE = tempfile.TemporaryDirectory()  # not the user's
WORDS = {"tin": 8, "brass": 45, "silver": 260, "gold": 820}


def run(*arguments, code=0):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "QLORA_CACHE": CACHE.name}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == code, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, a data file whose price is told by one word, and a trained run."""
    place = tmp_path_factory.mktemp("end_to_end")
    hugging_face_model(tiny_config(vocab_size=256, tie_word_embeddings=True), place / "model")
    (place / "model" / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
    rng = random.Random(0)
    rows = []
    for n in range(700):
        word = rng.choice(list(WORDS))
        price = round(WORDS[word] * rng.uniform(0.9, 1.1), 2)
        rows.append({"title": f"{word} {n}", "price": price, "category": "ring", "description": " ".join([word] * 8)})
    (place / "items.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"title": "x", "price": "N/A"}\n')
    options = ["--lr", "5e-3", "--epochs", "5", "--batch-tokens", "2048", "--val-items", "20", "--max-tokens", "140"]
    out, _ = run(
        "train.py", "--model", place / "model", "--data", place / "items.jsonl", "--out", place / "out", *options
    )
    (place / "train.txt").write_text(out)
    run("evaluate.py", "--ckpt", place / "out", "--quiet")
    return place


def priced_items(place):
    """(test, train) of the module's data"""
    items, _ = items_from_rows(read_rows(place / "items.jsonl"), "items")
    return [[item for item in items if item.split == split] for split in ("test", "train")]


def metrics_of(place, out="out"):
    return json.loads((place / out / "report" / "metrics.json").read_text())


def test_the_error_falls_far_below_the_constants(place):
    """Six other base models and five other seeds end between 0.05 and 0.10 after three epochs, in either dtype."""
    metrics = metrics_of(place)
    assert metrics["ratio"] < 0.35
    assert metrics["comparison"]["untuned model"]["ratio"] > 0.6
    assert metrics["n"] > 40


def test_the_truth_is_printed_before_training(place):
    out = (place / "train.txt").read_text()
    for words in (
        "left out: 1 rows with an unreadable price (first: row 701)",
        "trainable (LoRA), float32",
        "frozen linears, NF4",
        "carry the loss",
    ):
        assert words in out
    first = out.split("what is learnt in colour:")[1]
    assert "Price is $[" in first and "[.][0][0]" in first
    assert out.rstrip().endswith(f"now run    python evaluate.py --ckpt {place / 'out'}/")


def test_checkpoint_is_complete_and_without_pickle(place):
    files = {str(p.relative_to(place / "out")) for p in (place / "out").rglob("*") if p.is_file()}
    report = {
        f"report/{n}" for n in ("metrics.json", "predictions.csv", "scatter.png", "comparison.png", "report.html")
    }
    state = {"state/optimiser.safetensors", "state/progress.json", "state/complete"}
    files -= report | state
    assert files == {
        "adapter_model.safetensors", "adapter_config.json", "run.json", "metrics.jsonl", "head.safetensors",
        "validation.safetensors",
    }  # fmt: skip
    lines = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "lr", "tokens_per_second", "peak_memory_gib"} <= set(lines[0])
    record = json.loads((place / "out" / "run.json").read_text())
    assert record["options"]["bits"] == 4 and record["steps"] == lines[-1]["step"] and "sha256" in record["data"]


def test_evaluating_twice_gives_the_same_numbers(place):
    first, rows = metrics_of(place), (place / "out" / "report" / "predictions.csv").read_text()
    run("evaluate.py", "--ckpt", place / "out", "--quiet", "--no-untuned", "--batch-tokens", "700")
    second = metrics_of(place)
    assert (place / "out" / "report" / "predictions.csv").read_text() == rows
    errors, titles = zip(*((float(r["error"]), r["title"]) for r in csv.DictReader(io.StringIO(rows))), strict=True)
    assert second["mae_ci95"] == pytest.approx(bootstrap_interval(np.array(errors), titles), abs=0.01)
    test, train = priced_items(place)
    constant = np.mean([item.price for item in train])  # not of the test prices, which nobody knows
    assert second["constant_mae"] == pytest.approx(np.mean([abs(item.price - constant) for item in test]))
    assert second["leaks"]["share"] == len(leaks([i.text for i in train], [i.text for i in test])) / len(test) < 0.5
    for key in ("mae", "rmsle", "coverage", "width", "hits", "ratio", "bias", "r2"):
        assert second[key] == pytest.approx(first[key], rel=1e-5), key  # batches of other sizes, in float32


def test_all_baselines_stand_beside_the_model_and_two_reports_are_compared(place, tmp_path):
    out, _ = run("evaluate.py", "--ckpt", place / "out", "--quiet", "--no-untuned", "--baselines")
    metrics = metrics_of(place)
    assert set(metrics["comparison"]) == {"fine-tuned", BLEND, *BASELINES}
    for name in BASELINES:
        other = metrics["comparison"][name]
        assert other["above"]["difference"] == pytest.approx(other["mae"] - metrics["mae"])
    assert all(any(line.startswith(name) for line in out.splitlines()) for name in BASELINES)
    assert metrics["share"] == 0.8 and 0 < metrics["coverage"] <= 1 and metrics["width"] > 0
    shutil.copytree(place / "out" / "report", tmp_path / "median")
    run("evaluate.py", "--ckpt", place / "out", "--quiet", "--no-untuned", "--decode", "mean")
    out, _ = run("evaluate.py", "--compare", tmp_path / "median", place / "out" / "report")
    assert f"the same {metrics['n']} items: " in out
    run("evaluate.py", "--ckpt", place / "out", "--quiet", "--no-untuned", "--items", "9")
    _, err = run("evaluate.py", "--compare", tmp_path / "median", place / "out" / "report", code=2)
    assert f"priced different items ({metrics['n'] - 9} are only in the first, 0 only" in err and "Traceback" not in err


def test_what_the_head_reads_is_about_one_whatever_the_norms_weights(place, tmp_path):
    """As in Gemma: the last norm's largest weights stand where its inputs are smallest."""
    shutil.copytree(place / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    half = len(weights["model.norm.weight"]) // 2
    weights["model.norm.weight"][:half] = 100
    weights["model.embed_tokens.weight"][:, :half] *= 1e-3
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name][:half] *= 1e-3
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    options = "--lr 1e-9 --max-steps 1 --bits 16 --val-items 0 --max-tokens 120".split()
    data = "--data", place / "items.jsonl"
    run("train.py", "--model", tmp_path / "model", *data, "--out", tmp_path / "out", *options)
    opened = Predictor(tmp_path / "out", torch.device("cpu"), torch.float32)
    prompts = [encode_prompt(title, opened.tokenizer, 120)[0] for title in ("tin ring", "gold", "brass 7, silver 8")]
    states = last_states(opened.model, prompts, None)
    assert 0.8 < np.sqrt(np.square(states).mean()) / opened.heads[0].spread.unique().item() < 1.25


@pytest.mark.parametrize("decode", ["greedy", "mode", "mean"])
def test_other_ways_to_decode(place, decode):
    out, _ = run("evaluate.py", "--ckpt", place / "out", "--no-untuned", "--decode", decode, "--items", "9")
    assert sum(line.startswith("guess ") for line in out.splitlines()) == 9  # a line an item
    assert metrics_of(place)["decode"] == decode and metrics_of(place)["n"] == 9


def test_predict_prices_a_text_and_a_file(place):
    text = "gold 203\nring\n" + " ".join(["gold"] * 8)
    gold, _ = run("predict.py", "--ckpt", place / "out", text)
    half, _ = run("predict.py", "--ckpt", place / "out", text, "--interval", "50")
    ends = [[int(n) for n in re.findall(r"\$(\d+)", line)] for line in (gold, half)]
    assert ends[0][0] == ends[1][0] and ends[0][1] <= ends[1][1] and ends[1][2] < ends[0][2], (gold, half)
    tin, _ = run("predict.py", "--ckpt", place / "out", "tin 203\nring\n" + " ".join(["tin"] * 8))
    price = [int(line.split()[0].lstrip("$")) for line in (gold, tin)]
    assert price[0] > 500 and price[1] < 60 and "(80 %: $" in gold
    (place / "new.csv").write_text(
        "title,category,description\n" + "".join(f"{w} 203,ring,{' '.join([w] * 8)}\n" for w in ("gold", "tin"))
    )
    table, _ = run("predict.py", "--ckpt", place / "out", "--file", place / "new.csv")
    lines = table.strip().splitlines()
    assert lines[0] == "text,price,low,high" and len(list(csv.reader(io.StringIO(table)))) == 3
    prices = [int(r[1]) for r in list(csv.reader(io.StringIO(table)))[1:]]
    assert prices[0] > 500 and prices[1] < 60
    (place / "new.txt").write_text("\n".join(f"{word} {n} " * n for n, word in enumerate(3 * list(WORDS), 1)))
    command = "--ckpt", place / "out", "--file", place / "new.txt"
    table, said = run("predict.py", *command)
    assert "3 of 12 texts are longer than the run's --max-tokens 140 and were cut" in said
    in_fives = "import predict; predict.CHUNK = 5; predict.main(predict.pricing_options(predict.__doc__))"
    again, _ = run("-c", in_fives, *command)
    assert again == table and len(list(csv.reader(io.StringIO(table)))) == 13


def test_merged_weights_give_the_prices_of_the_adapter(place):
    """Logits of the merged directory, in 16 bits, against base in 4 bits plus adapter; and not those of the plain
    base."""
    from conftest import our_model

    from llama.attention import Layout
    from lora.adapter import load_adapter

    run("-m", "lora.merge", "--ckpt", place / "out", "--base", place / "model", "--out", place / "merged")
    tokens, layout = torch.arange(40, 100), Layout.packed([60])
    adapted = our_model(place / "model", bits=4)
    load_adapter(adapted, place / "out")
    logits = [
        model(tokens, layout).detach() for model in (adapted, our_model(place / "merged"), our_model(place / "model"))
    ]
    far = (logits[2] - logits[0]).norm()
    assert (logits[1] - logits[0]).norm() < 0.05 * far  # bfloat16 rounding of the merged weights
    _, err = run(
        "-m", "lora.merge", "--ckpt", place / "out", "--base", place / "model", "--out", place / "merged", code=2
    )
    assert "exists" in err


def test_16_bits_and_bfloat16_and_the_soft_loss_run(place):
    options = [
        "--bits",
        "16",
        "--dtype",
        "bf16",
        "--loss",
        "soft",
        "--max-steps",
        "3",
        "--val-items",
        "0",
        "--optimiser",
        "sgd",
        "--max-tokens",
        "120",
        "--accumulate",
        "2",
        "--readable",
    ]
    run("train.py", "--model", place / "model", "--data", place / "items.jsonl", "--out", place / "out16", *options)
    out, _ = run("evaluate.py", "--ckpt", place / "out16", "--quiet", "--no-untuned", "--dtype", "bf16", "--items", "5")
    assert "5 held-out items" in out
    run("evaluate.py", "--ckpt", place / "out16", "--quiet", "--no-untuned", "--decode", "greedy", "--items", "5")
    metrics, (_, train) = metrics_of(place, "out16"), priced_items(place)
    assert metrics["parse_failures"] == 5  # nothing learnt: what it writes is no price
    np.testing.assert_allclose(guesses(place / "out16")[:, 0], np.median([item.price for item in train]), atol=0.01)


def test_8_bits_train_resume_evaluate_predict_and_merge(place):
    options = ["--bits", "8", "--outlier-threshold", "5", "--dtype", "bf16", "--max-tokens", "120", "--save-every", "2"]
    options += ["--schedule", "constant", "--warmup", "0", "--val-items", "0"]
    common = ["--model", place / "model", "--data", place / "items.jsonl", *options]
    out, _ = run("train.py", *common, "--max-steps", "4", "--out", place / "out8")
    assert "frozen linears, int8" in out and "keep their dequantised weights" in out
    record = json.loads((place / "out8" / "run.json").read_text())
    assert record["options"]["bits"] == 8 and record["options"]["outlier_threshold"] == 5.0
    assert "at a peak rate of 0.002; first item" in out and record["options"]["lr"] == 2e-3  # not told
    run("train.py", *common, "--max-steps", "2", "--out", place / "begun8")
    settings = json.loads((place / "begun8" / "run.json").read_text())
    settings["options"]["max_steps"] = 4  # as if it had been stopped after its first checkpoint
    (place / "begun8" / "state" / "complete").unlink()
    (place / "begun8" / "run.json").write_text(json.dumps(settings))
    run("train.py", "--resume", "--out", place / "begun8")
    ended = [load_file(place / name / "adapter_model.safetensors") for name in ("out8", "begun8")]
    assert all((ended[0][key] == ended[1][key]).all() for key in ended[0])
    out, _ = run("evaluate.py", "--ckpt", place / "out8", "--quiet", "--no-untuned", "--items", "5", "--dtype", "bf16")
    assert "5 held-out items" in out
    assert "$" in run("predict.py", "--ckpt", place / "out8", "gold gold ring", "--dtype", "bf16")[0]
    run("-m", "lora.merge", "--ckpt", place / "out8", "--base", place / "model", "--out", place / "merged8")


# Beginning of a script that runs train.py and is killed right after its first checkpoint.
KILLED = """
import contextlib, sys, train
from pipeline import checkpoint
plain = checkpoint.write_directory
@contextlib.contextmanager
def once(out):
    with plain(out) as part:
        yield part
    sys.exit(9)
checkpoint.write_directory = once
"""


def test_a_resumed_run_equals_an_unbroken_one(place):
    common = [
        "--model",
        place / "model",
        "--data",
        place / "items.jsonl",
        "--val-items",
        "0",
        "--dropout",
        "0.1",
        "--batch-tokens",
        "1024",
        "--dtype",
        "fp32",
    ]
    run("train.py", *common, "--max-steps", "6", "--out", place / "whole")
    killed = KILLED + "train.main(train.training_options())"
    run("-c", killed, *common, "--max-steps", "6", "--save-every", "3", "--out", place / "broken", code=9)
    _, said = run("predict.py", "--ckpt", place / "broken", "gold")
    assert "saved at step 3 of a run that has not come to its end: train.py --resume" in said
    run("train.py", "--resume", "--out", place / "broken")
    _, said = run("predict.py", "--ckpt", place / "broken", "gold")
    assert "has not come to its end" not in said
    whole, broken = (load_file(place / n / "adapter_model.safetensors") for n in ("whole", "broken"))
    assert all((whole[k] == broken[k]).all() for k in whole)
    whole, broken = (load_file(place / n / "head.safetensors") for n in ("whole", "broken"))
    assert all((whole[k] == broken[k]).all() for k in whole)
    steps = [json.loads(x)["step"] for x in (place / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    # Complete: resuming again adds nothing and takes nothing away. Other options or other data are refused.
    (place / "broken" / "note.txt").write_text("mine")
    out, _ = run("train.py", "--resume", "--out", place / "broken")
    assert "trained    6 steps" in out and (place / "broken" / "note.txt").is_file()
    _, err = run("train.py", "--resume", "--out", place / "broken", "--lr", "1", code=2)
    assert "leave out --lr" in err
    record = json.loads((place / "broken" / "run.json").read_text())
    record["data"]["items"] = 5
    (place / "broken" / "run.json").write_text(json.dumps(record))
    (place / "broken" / "state" / "complete").unlink()
    _, err = run("train.py", "--resume", "--out", place / "broken", code=2)
    assert "has changed since" in err


def test_a_resumed_run_keeps_the_optimiser_that_memory_chose(place):
    """What is free when it goes on may ask for another; the state on disk is that of the first."""
    common = ["--model", place / "model", "--data", place / "items.jsonl", "--val-items", "0", "--batch-tokens", "1024"]
    otherwise = 'train.plan_memory = lambda *args: (train.fast.Plan(optimiser="sgd"), [])\n'
    killed = KILLED + otherwise + "train.main(train.training_options())"
    out = place / "settled"
    run("-c", killed, *common, "--max-steps", "4", "--save-every", "2", "--out", out, code=9)
    run("train.py", "--resume", "--out", out)
    record = json.loads((out / "run.json").read_text())
    assert record["plan"] == {"optimiser": "sgd", "head8": False} and record["steps"] == 4


def test_epochs_end_with_their_short_batch_and_minutes_end_with_a_validation(place, tmp_path):
    rows = [json.dumps({"title": f"t {n}", "price": 5, "split": "val" if n < 3 else "train"}) for n in range(20)]
    (tmp_path / "few.jsonl").write_text("\n".join(rows))
    common = ["train.py", "--model", place / "model", "--data", tmp_path / "few.jsonl", "--out", tmp_path / "o"]
    said, _ = run(*common, "--batch-tokens", "1000", "--epochs", "3")  # 17 items: two batches an epoch
    record = json.loads((tmp_path / "o" / "run.json").read_text())
    assert record["steps"] == 6 and "no item is in the test split; evaluate.py will have nothing to price" in said
    run(*common, "--epochs", "1000", "--max-minutes", "0.03", "--log-every", "7")
    lines = [json.loads(x) for x in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[-1]["step"] < 2000 and lines[-1]["val_mae_dollars"] is not None
    assert json.loads((tmp_path / "o" / "run.json").read_text())["tokens"] > sum(x.get("tokens", 0) for x in lines)


def test_what_a_user_gets_wrong_is_one_line_and_exit_code_2(place, tmp_path):
    model, data = ["--model", place / "model"], ["--data", place / "items.jsonl"]
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bare").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not lose me")
    row = {"title": "tin 1", "price": 8, "description": "tin", "split": "train"}
    (tmp_path / "no_val.jsonl").write_text(json.dumps(row))
    no_val = ["--data", tmp_path / "no_val.jsonl"]
    (tmp_path / "rows.json").write_text('{"a": []}')
    for name, key, value in (("five", "bits", 5), ("word", "batch_tokens", "4oo"), ("blind", "prompt", "What?")):
        shutil.copytree(place / "out", tmp_path / name)
        record = json.loads((place / "out" / "run.json").read_text())
        (record if key == "prompt" else record["options"])[key] = value
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    (tmp_path / "latin.txt").write_bytes(b"ring\xe9")
    ablation = ["-m", "benchmarks.ablation", "--rows", tmp_path / "rows.json", "--out", tmp_path / "rows"]
    other, merge = tmp_path / "other", ["-m", "lora.merge", "--ckpt", place / "out"]
    hugging_face_model(tiny_config(vocab_size=256, tie_word_embeddings=True, intermediate_size=128), other)
    best, long = ["--keep", "best"], ["--max-tokens", "9999", "--batch-tokens", "9999"]
    (tmp_path / "long.jsonl").write_text(json.dumps(row | {"description": "tin " * 300}))
    cases = [
        (["train.py", *model, *no_val, *best], "no_val.jsonl: no new item is in the val split"),
        (["train.py", *model, "--data", tmp_path / "long.jsonl", *long], "knows 512 positions, an item has 1,"),
        (["-m", "benchmarks.ablation", "--rows", tmp_path / "no.json"], "no.json"),
        ([*ablation, "--jobs", "0"], "--jobs must be at least 1"),
        ([*ablation, "--data", tmp_path / "empty.jsonl"], "1 of 1 rows failed: a"),
        (["train.py", *model, "--data", tmp_path / "no.jsonl"], "no.jsonl does not exist"),
        (["train.py", *model, "--data", tmp_path / "empty.jsonl"], "empty.jsonl holds no usable item: it is empty"),
        (["train.py", *model, *data, "--strict"], "items.jsonl, row 701: one of the rows with an unreadable price"),
        (["train.py", "--model", tmp_path / "bare", *data], "config.json does not exist|has neither tokenizer.json"),
        (["train.py", "--model", "nonsense", *data], "nonsense does not exist; --model takes"),
        (["train.py", *model, *data, "--targets", "wq"], "LoRA targets wq name no layer"),
        (["train.py", *model, *data, "--out", tmp_path / "full"], "full exists and is no earlier run"),
        (["train.py", "--resume", "--out", tmp_path / "bare"], "bare is no checkpoint of train.py"),
        (["evaluate.py", "--ckpt", tmp_path / "bare"], "bare is no checkpoint of train.py"),
        (["evaluate.py", "--compare", tmp_path / "bare", place], "bare is not a report of evaluate.py"),
        (["predict.py", "--ckpt", tmp_path / "nowhere", "mug"], "nowhere is no checkpoint of train.py"),
        (["predict.py", "--ckpt", tmp_path / "damaged", "mug"], "run.json is damaged or of another version"),
        (["predict.py", "--ckpt", tmp_path / "five", "mug"], "five/run.json is damaged or of another version"),
        (["train.py", "--resume", "--out", tmp_path / "word"], "batch_tokens is '4oo'"),
        (["predict.py", "--ckpt", tmp_path / "blind", "mug"], "the prompt is 'What?'"),
        (["predict.py", "--ckpt", place / "out", "--file", tmp_path / "latin.txt"], "latin.txt is not in UTF-8"),
        (["train.py", *model, *data, "--memory-budget", "6"], "'6' is 6 bytes; write 6GiB"),
        (["train.py", *model, *data, "--banana", "6"], "unrecognized arguments: --banana 6 (--help says what"),
        ([*merge, "--base", other, "--out", tmp_path / "m"], "another base model?"),
        (["predict.py", "--ckpt", place / "out", " "], "the text to price is empty"),
        (["-m", "llama.gguf", tmp_path / "no.gguf", tmp_path / "x"], "no.gguf does not exist"),
    ]
    for arguments, words in cases:
        out, err = run(
            *arguments,
            *(["--out", tmp_path / "o"] if arguments[0] == "train.py" and "--out" not in arguments else []),
            code=2,
        )
        last = err.strip().splitlines()[-1]
        assert last.startswith("error: ") and any(w in last for w in words.split("|")), (arguments, err)
        assert "Traceback" not in err
    assert not (tmp_path / "o").exists()
    assert (tmp_path / "full" / "thesis.txt").read_text() == "do not lose me"


def test_the_best_check_is_kept_and_its_ranges_are_calibrated(place, tmp_path):
    (tmp_path / "ask.txt").write_text("{text}\nPrice: $")
    out, _ = run(
        "train.py", "--model", place / "model", "--data", place / "items.jsonl", "--out", place / "best",
        "--prompt", tmp_path / "ask.txt", "--keep", "best", "--patience", "2", "--val-every", "3", "--val-items", "20",
        "--max-steps", "60", "--lr", "1", "--clip", "1000", "--batch-tokens", "1500", "--max-tokens", "140",
    )  # fmt: skip
    assert "no better validation error in 2 checks" in out  # such a rate destroys whatever is learnt
    record = json.loads((place / "best" / "run.json").read_text())
    checks = [json.loads(x) for x in (place / "best" / "metrics.jsonl").read_text().splitlines() if "val_mae" in x]
    assert record["steps"] == min(checks, key=lambda c: c["val_mae_dollars"])["step"] < 60
    assert f"the best of {record['steps'] // 3 + 2} checks" in out  # and two that were not
    assert record["prompt"] == "{text}\nPrice: $" and record["validation"]["items"] > 20
    run("evaluate.py", "--ckpt", place / "best", "--quiet", "--no-untuned", "--interval", "90")
    metrics = metrics_of(place, "best")
    assert metrics["calibrated"] and metrics["share"] == 0.9 and metrics["coverage"] > 0.75
    assert 0 <= metrics["leaks"]["share"] <= 1


@pytest.mark.parametrize("plan", ["Plan()", "Plan(head8=True)"])
def test_training_and_pricing_see_the_same_validation_items_alike(place, tmp_path, plan):
    """With dropout, which is for training alone; beside an lm_head in 8 bits. Texts trained on take no part in it."""
    hugging_face_model(tiny_config(vocab_size=256, tie_word_embeddings=False), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
    rows = [{"title": f"tin {n}", "price": 5 + n % 40, "split": "val" if n % 2 else "train"} for n in range(60)]
    rows += [row | {"split": "val"} for row in rows if row["split"] == "train"]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    planned = f"import train; train.plan_memory = lambda *args: (train.fast.{plan}, []); "
    planned += "train.main(train.training_options())"
    options = ["--dropout", "0.5"] if plan == "Plan()" else []
    options += ["--max-steps", "3", "--batch-tokens", "512", "--lr", "5e-3", "--out", tmp_path / "out"]
    run("-c", planned, "--model", tmp_path / "model", "--data", tmp_path / "items.jsonl", *options)
    run("evaluate.py", "--ckpt", tmp_path / "out", "--split", "val", "--quiet", "--no-untuned")
    validation = json.loads((tmp_path / "out" / "run.json").read_text())["validation"]
    priced = json.loads((tmp_path / "out" / "report_val" / "metrics.json").read_text())
    assert validation["items"] == priced["n"] == 30
    assert validation["mae_dollars"] == pytest.approx(priced["mae"], rel=1e-5)
    cpu = torch.device("cpu")
    calibration, opened = read_calibration(tmp_path / "out"), Predictor(tmp_path / "out", cpu, pick_dtype("auto", cpu))
    assert (opened.model.head_scale is not None) == ("head8" in plan)
    items = [item for item in run_items(opened.record) if item.split == "val" and int(item.title.split()[1]) % 2]
    found = opened.predict(opened.prompts(sample(items, 1000)))
    np.testing.assert_allclose(found.digits, calibration["digits"], atol=1e-4)
    found, truth = opened.predict(opened.prompts(items)), np.array([item.price for item in items])
    low, high, _ = cross_calibrated_range(found.quantiles("blend"), found.median(), 0.8, truth)
    with open(tmp_path / "out" / "report_val" / "predictions.csv", newline="") as file:
        said = {row["id"]: (float(row["low"]), float(row["high"])) for row in csv.DictReader(file)}
    np.testing.assert_allclose([said[item.id] for item in items], np.stack([low, high], 1), rtol=1e-3, atol=0.01)


def test_data_that_changed_since_training_is_refused(place, tmp_path):
    shutil.copytree(place / "out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    record["data"]["sha256"] = "0" * 64
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    _, err = run("evaluate.py", "--ckpt", tmp_path / "out", code=2)
    assert "has changed since" in err


def guesses(ckpt) -> np.ndarray:
    """Of report/predictions.csv: guess, low, high, by id"""
    rows = sorted(csv.DictReader(open(ckpt / "report" / "predictions.csv", newline="")), key=lambda row: row["id"])
    return np.array([[float(row[key]) for key in ("guess", "low", "high")] for row in rows])


def test_members_are_whole_runs_and_their_predictions_are_averaged_with_neighbours_in_the_prompt(place, tmp_path):
    common = [
        "train.py", "--model", place / "model", "--data", place / "items.jsonl", "--max-steps", "6",
        "--val-items", "20", "--batch-tokens", "2048", "--lr", "5e-3", "--max-tokens", "140", "--neighbours", "2",
    ]  # fmt: skip
    out, _ = run(*common, "--members", "2", "--out", tmp_path / "two")
    assert "member     2 of 2" in out and out.rstrip().endswith(f"evaluate.py --ckpt {tmp_path / 'two'}/")
    assert "Similar products cost $" in out.split("in colour:")[1]
    run(*common, "--seed", "1", "--out", tmp_path / "one")  # the second member, by itself
    own, other = tmp_path / "one", tmp_path / "two" / "members" / "1"
    same = [load_file(path / "adapter_model.safetensors") for path in (own, other)]
    assert all((same[0][key] == same[1][key]).all() for key in same[0])
    price = ["evaluate.py", "--quiet", "--no-untuned", "--prune", "0", "--decode"]
    for decode in ("median", "head", "blend"):
        for ckpt in ("two", "one"):
            run(*price, decode, "--ckpt", tmp_path / ckpt)
        first = tmp_path / "first"  # the first member, by itself
        shutil.rmtree(first, ignore_errors=True)
        shutil.copytree(tmp_path / "two", first, ignore=shutil.ignore_patterns("members", "report"))
        record = json.loads((first / "run.json").read_text())
        record["options"]["members"] = 1
        (first / "run.json").write_text(json.dumps(record))
        run(*price, decode, "--ckpt", first)
        each = [guesses(tmp_path / name)[:, 0] for name in ("first", "one")]
        assert np.abs(each[0] - each[1]).max() > 1
        np.testing.assert_allclose(guesses(tmp_path / "two")[:, 0], np.sqrt(each[0] * each[1]), rtol=1e-3, atol=0.02)
    two = Predictor(tmp_path / "two", torch.device("cpu"), torch.float32)
    heads = [read_calibration(path) for path in two.paths]
    np.testing.assert_allclose(two.calibration("head")[0], (heads[0]["head"] + heads[1]["head"]) / 2)
    blend = sum(part[kind] for part in heads for kind in ("digits", "head")) / 4
    np.testing.assert_allclose(two.calibration("blend")[0], blend)
    assert np.abs(heads[0]["head"] - heads[1]["head"]).max() > 0.01
    shutil.move(tmp_path / "two" / "head.safetensors", tmp_path / "away")
    _, err = run("evaluate.py", "--ckpt", tmp_path / "two", code=2)
    assert "head.safetensors is missing" in err
    shutil.move(tmp_path / "away", tmp_path / "two" / "head.safetensors")
    mixed = tmp_path / "mixed"
    shutil.copytree(tmp_path / "two", mixed)
    whole = load_file(mixed / "validation.safetensors")
    save_file({name: whole[name] for name in ("price", "digits")}, mixed / "validation.safetensors")
    _, err = run("predict.py", "--ckpt", mixed, "gold", code=2)
    assert "lacks what ranges of blend are calibrated by" in err
    shutil.rmtree(other)
    _, err = run("predict.py", "--ckpt", tmp_path / "two", "gold ring", code=2)
    assert "holds 1 of its 2 members; go on with train.py --resume" in err
    first = (tmp_path / "two" / "run.json").stat().st_mtime_ns
    out, _ = run("train.py", "--resume", "--out", tmp_path / "two")
    assert "two/ is complete" in out and (tmp_path / "two" / "run.json").stat().st_mtime_ns == first
    again = load_file(other / "adapter_model.safetensors")
    assert all((same[0][key] == again[key]).all() for key in again)
    _, err = run("evaluate.py", "--ckpt", tmp_path / "two", "--decode", "greedy", "--items", "3", code=2)
    assert "has 2 members" in err


def test_items_that_were_trained_on_are_left_out(place, tmp_path):
    rows = [json.loads(line) for line in (place / "items.jsonl").read_text().splitlines()][:60]
    new = {"title": "tin 1000", "price": 8, "category": "ring", "description": "never seen", "split": "test"}
    lines = [json.dumps(row | {"split": "test"}) for row in rows] + [json.dumps(new)]
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    out, _ = run("evaluate.py", "--ckpt", place / "out", "--data", tmp_path / "other.jsonl", "--no-untuned", "--quiet")
    left = int(out.split("items left out: the run was trained on")[0].split()[-1])
    assert 40 < left < 60 and f"{61 - left} held-out items" in out
    seen = next(row for row in rows if split_of(row["title"]) == "train")
    (tmp_path / "other.jsonl").write_text(json.dumps(seen | {"split": "test"}))
    _, err = run("evaluate.py", "--ckpt", place / "out", "--data", tmp_path / "other.jsonl", code=2)
    assert "were trained on" in err
