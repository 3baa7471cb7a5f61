"""predict.py as a user runs it, on a tiny random model; merged weights; a run of several members.

    python -m pytest tests/pipeline/test_predict.py
"""

import csv
import io
import json
import re
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from trained_run import WORDS, guesses, run, seal_again

from pipeline.checkpoint import read_calibration
from pipeline.predictor import Predictor


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
    assert "3 of 12 texts are longer than --max-tokens 140: " in said and "is cut off (the run's limit)" in said
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


def test_members_are_whole_runs_and_their_predictions_are_averaged(place, tmp_path):
    common = [
        "train.py", "--model", place / "model", "--data", place / "items.jsonl", "--max-steps", "6",
        "--val-items", "20", "--batch-tokens", "2048", "--lr", "5e-3", "--max-tokens", "140",
    ]  # fmt: skip
    out, _ = run(*common, "--members", "2", "--out", tmp_path / "two")
    assert "member     2 of 2" in out and out.rstrip().endswith(f"evaluate.py --ckpt {tmp_path / 'two'}/")
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
        seal_again(first)
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
    seal_again(mixed)
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
