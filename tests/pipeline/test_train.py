"""train.py as a user runs it, on a tiny random model: what it prints and leaves, precisions, resuming, stopping.

    python -m pytest tests/pipeline/test_train.py
"""

import json
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from trained_run import guesses, metrics_of, priced_items, run, seal_again

from pipeline.prediction import last_states
from pipeline.predictor import Predictor
from pricing.data.prompt import encode_prompt


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
        "validation.safetensors", "manifest.json",
    }  # fmt: skip
    lines = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "lr", "tokens_per_second", "peak_memory_gib"} <= set(lines[0])
    record = json.loads((place / "out" / "run.json").read_text())
    assert record["options"]["bits"] == 4 and record["steps"] == lines[-1]["step"] and "sha256" in record["data"]


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
    seal_again(place / "begun8")
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
plain = checkpoint.update_directory
@contextlib.contextmanager
def once(*given, **options):
    with plain(*given, **options) as part:
        yield part
    sys.exit(9)
checkpoint.update_directory = once
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
    killed = KILLED + "train.main(train.training_options(train.__doc__))"
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
    seal_again(place / "broken")
    _, err = run("train.py", "--resume", "--out", place / "broken", code=2)
    assert "has changed since" in err


def test_a_resumed_run_keeps_the_optimiser_that_memory_chose(place):
    """What is free when it goes on may ask for another; the state on disk is that of the first."""
    common = ["--model", place / "model", "--data", place / "items.jsonl", "--val-items", "0", "--batch-tokens", "1024"]
    otherwise = 'train.plan_memory = lambda *args: (train.fast.Plan(optimiser="sgd"), [])\n'
    killed = KILLED + otherwise + "train.main(train.training_options(train.__doc__))"
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


def test_a_run_with_a_loss_that_is_gone_is_not_gone_on_with(place, tmp_path):
    """Before anything is loaded; it can still be priced."""
    shutil.copytree(place / "out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    record["options"] |= {"loss": "crps", "crps_weight": 1.0}
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    seal_again(tmp_path / "out")
    _, err = run("train.py", "--resume", "--out", tmp_path / "out", code=2)
    assert "was started with --loss crps, which is gone: train again with answer, price, soft" in err
    out, _ = run("predict.py", "--ckpt", tmp_path / "out", "gold ring")
    assert out.startswith("$")
