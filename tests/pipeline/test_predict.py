"""predict.py as a user runs it, on a tiny random model; merged weights; a run of several members.

    python -m pytest tests/pipeline/test_predict.py
"""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trained_run import ROOT, WORDS, guesses, run, seal_again

from pipeline.checkpoint import read_calibration
from pipeline.predictor import Predictor
from predict import read_texts


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


# ---- files of texts --------------------------------------------------------------------------------------------------


def rows_of(table):
    return list(csv.DictReader(io.StringIO(table)))


def test_a_row_of_output_for_each_row_of_input_blank_ones_included(place, tmp_path):
    """In order, over chunks of two; ids are handed through; only line ends end lines"""
    texts = ["gold 1", "", "tin\u20282", "  ", "brass\x0c3\x854", ""]
    (tmp_path / "a.txt").write_bytes("\r\n".join([*texts[:-1], "", ""]).encode())
    in_twos = "import predict; predict.CHUNK = 2; predict.main(predict.pricing_options(predict.__doc__))"
    table, _ = run("-c", in_twos, "--ckpt", place / "out", "--file", tmp_path / "a.txt")
    assert [row["text"] for row in rows_of(table)] == [text.strip() for text in texts]
    assert [bool(row["price"]) for row in rows_of(table)] == [bool(text.strip()) for text in texts]
    (tmp_path / "a.csv").write_text("id,title\n=7,gold 1\n,\n\n9,tin 2\n")
    table, _ = run("predict.py", "--ckpt", place / "out", "--file", tmp_path / "a.csv")
    assert [row["id"] for row in rows_of(table)] == ["'=7", "", "", "9"]
    assert [bool(row["price"]) for row in rows_of(table)] == [True, False, False, True]
    (tmp_path / "a.jsonl").write_text('{"id": 4, "title": "=gold"}\n\n{"id": 5}\n')
    table, _ = run("predict.py", "--ckpt", place / "out", "--file", tmp_path / "a.jsonl")
    assert [(row["id"], row["text"]) for row in rows_of(table)] == [("4", "'=gold"), ("", ""), ("5", "")]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv", "title,stars\nring, 9 mm,4\n", "a.csv, row 1: one of the rows with more cells than the header"),
        ("a.csv", "title,title\na,b\n", "two columns of the name 'title'"),
        ("a.csv", "name,stars\na,b\n", "a.csv: no row has a text; its columns are name, stars"),
        ("a.jsonl", '{"title": "tin"}\n{"title": {"en": "tin"}}\n', "row 2: one of the rows whose column 'title' is"),
        ("a.jsonl", '{"title": "tin"}\nnot json\n', "row 2: one of the rows that are not an object"),
        ("a.jsonl", "", "a.jsonl: it is empty"),
        ("a.txt", "\n\n", "a.txt: no row has a text"),
        ("a.json", "[]", "a.json: expected .jsonl, .csv or .parquet; write one object a line"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        read_texts(tmp_path / name)
    assert words in str(error.value)


def test_what_was_priced_stays_when_predict_is_stopped(place, tmp_path):
    """Rows come while later ones are not priced yet: Ctrl-C in the third chunk leaves two."""
    (tmp_path / "a.txt").write_text("".join(f"tin {n}\n" for n in range(40)))
    stopped = """
import sys, predict, pipeline.predictor
from common.cli import run_main
predict.CHUNK, price, calls = 8, pipeline.predictor.Predictor.predict, []
def predict_or_stop(self, *args, **options):
    calls.append(1)
    if len(calls) == 3:
        raise KeyboardInterrupt
    return price(self, *args, **options)
pipeline.predictor.Predictor.predict = predict_or_stop
run_main(lambda: predict.main(predict.pricing_options(predict.__doc__)))
"""
    command = "--ckpt", place / "out", "--file", tmp_path / "a.txt"
    table, _ = run("-c", stopped, *command, code=130)
    whole, _ = run("predict.py", *command)
    assert len(rows_of(table)) == 16 and whole.startswith(table)


def test_head_is_no_error(place, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{'tin ' * 20}{n}\n" for n in range(3000)))
    pipe = f"{sys.executable} predict.py --ckpt {place / 'out'} --file {tmp_path / 'a.txt'} | head -n 2"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", f"{pipe}; exit ${{PIPESTATUS[0]}}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count("\n") == 2, done.stderr[-900:]
    assert "Error" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize("locale", [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_terminal_that_lacks_a_sign_still_gets_its_prices(place, tmp_path, monkeypatch, locale):
    """And files are in UTF-8 all the same"""
    for name, value in locale.items():
        monkeypatch.setenv(name, value)
    out, _ = run("predict.py", "--ckpt", place / "out", "gold \u2013 \x1b[2J ring")
    assert out.startswith("$") and out.rstrip().endswith("gold ? \\x1b[2J ring")
    (tmp_path / "a.txt").write_text("gold \u2013 \u4e2d\n", encoding="utf-8")
    table, _ = run("predict.py", "--ckpt", place / "out", "--file", tmp_path / "a.txt")
    assert rows_of(table)[0]["text"] == "gold \u2013 \u4e2d"
