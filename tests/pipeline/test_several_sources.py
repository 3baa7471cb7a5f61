"""Several sources in one run, going on from a run, guesses beside the model's: through the scripts."""

import csv
import json
import shutil
from argparse import Namespace

import numpy as np
import pytest
from conftest import hugging_face_model, tiny_config
from safetensors.torch import load_file
from trained_run import metrics_of, priced_items, run, seal_again

from pipeline.data import TrainingData
from pipeline.options import training_options
from pricing.data.items import Item


def refusal(*arguments) -> str:
    """The one line that a script ends in, exit code 2"""
    _, error = run(*arguments, code=2)
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


OPTIONS = ["--batch-tokens", "2048", "--val-items", "20", "--max-steps", "3"]


@pytest.fixture(scope="module")
def both(place):
    """A run on the module's rings and on lamps at ten times the price"""
    words = {"tin": 80, "brass": 450}
    rows = [{"title": f"{w} lamp {n}", "price": p, "description": w} for n in range(60) for w, p in words.items()]
    (place / "lamps.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--data", place / "items.jsonl", place / "lamps.jsonl", "--origin", "rings", "lamps"]
    out, _ = run("train.py", "--model", place / "model", *data, "--out", place / "both", *OPTIONS)
    (place / "both.txt").write_text(out)
    return place


def test_the_prompt_carries_the_origin_and_run_json_knows_them(both):
    said, record = (both / "both.txt").read_text(), json.loads((both / "both" / "run.json").read_text())
    assert "  | Origin: " in said and "items.jsonl: left out: 1 rows with an unreadable price" in said
    assert record["origins"] == ["rings", "lamps"] and record["options"]["origin"] == ["rings", "lamps"]
    assert [source["items"] for source in record["data"]["sources"]] == [700, 120]


def test_the_longest_text_decides_how_many_tokens_are_read(both):
    options = json.loads((both / "both" / "run.json").read_text())["options"]
    assert options["max_tokens"] == 176  # at least, as new texts may be longer than those that it learnt from
    assert "longer than --max-tokens" not in (both / "both.txt").read_text()


class Letters:
    """A tokenizer of single signs"""

    def encode_prompt(self, text):
        return list(map(ord, text))

    encode_answer = encode_prompt


@pytest.mark.parametrize("lengths, budget, limit, cut", [
    ([20, 30], 4096, 176, 0), ([20, 300], 4096, 302, 0), ([20, 900], 4096, 384, 1), ([20, 900], 256, 250, 1),
])  # fmt: skip
def test_the_token_limit_follows_the_data(lengths, budget, limit, cut):
    items = [Item(str(n), "a", "a" * length, 5.0, "", "train") for n, length in enumerate(lengths)]
    data = TrainingData(2, items, [], [], 0, {}, 0, {}, "{text}\n$", [""])
    options = Namespace(max_tokens=None, batch_tokens=budget)
    examples = data.encode(items, Letters(), options)
    assert options.max_tokens == limit and sum(e.cut > 0 for e in examples) == cut
    assert all(len(e.prompt) <= limit for e in data.encode(items[:1], Letters(), options))


def test_only_the_first_source_is_priced(both):
    run("evaluate.py", "--ckpt", both / "both", "--quiet", "--no-untuned")
    with open(both / "both" / "report" / "predictions.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) > 40 and not any("lamp" in row["title"] for row in rows)
    rings = np.mean([item.price for item in priced_items(both)[1]])  # of the training items of the same origin
    constant = np.mean([abs(float(row["truth"]) - rings) for row in rows])
    assert metrics_of(both, "both")["constant_mae"] == pytest.approx(constant, abs=0.01)


def test_an_origin_that_the_run_does_not_know_ends_in_one_line(both):
    error = refusal("predict.py", "--ckpt", both / "both", "--origin", "shoes", "gold")
    assert "other origins: 'rings', 'lamps'" in error
    assert run("predict.py", "--ckpt", both / "both", "--origin", "lamps", "tin lamp")[0].startswith("$")
    error = refusal("evaluate.py", "--ckpt", both / "out", "--origin", "lamps")
    assert "other origins: none" in error


def test_a_run_goes_on_from_another(both):
    """With a rate of nearly nothing it has the other's adapter and head; what is not said is as it was there."""
    data = ["--data", both / "lamps.jsonl"]
    run("train.py", "--start-from", both / "out", "--out", both / "second", *data, "--lr", "1e-12", "--max-steps", "1")
    for name in ("adapter_model.safetensors", "head.safetensors"):
        first, second = (load_file(both / ckpt / name) for ckpt in ("out", "second"))
        assert first.keys() == second.keys() and all(np.allclose(first[k], second[k], atol=1e-6) for k in first)
    record = json.loads((both / "second" / "run.json").read_text())
    assert record["options"]["max_tokens"] == 140 and record["options"]["model"] == str(both / "model")
    assert record["started_from"]["directory"] == str(both / "out") and record["started_from"]["started_from"] is None


def test_what_the_first_run_learnt_from_is_never_priced(both):
    """The second run has some of the first one's training items in its test split."""
    rows = [json.loads(line) for line in (both / "items.jsonl").read_text().splitlines()[:700]]
    rows = [row | {"split": "test" if n < 200 else "train"} for n, row in enumerate(rows)]
    (both / "again.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ["--data", both / "again.jsonl", "--max-steps", "1", "--val-items", "0"]
    run("train.py", "--start-from", both / "out", "--out", both / "third", *more)
    said, _ = run("evaluate.py", "--ckpt", both / "third", "--quiet", "--no-untuned")
    left_out = int(said.split(" items left out: the run was trained on the same texts")[0].split()[-1])
    assert left_out > 150 and metrics_of(both, "third")["n"] == 200 - left_out


@pytest.mark.parametrize("words, message", [
    (["--rank", "8"], "goes on with that run's model and adapter; leave out --rank"),
    (["--model", "smollm2"], "leave out --model"),
])  # fmt: skip
def test_what_an_adapter_is_cannot_be_changed(both, words, message):
    error = refusal("train.py", "--start-from", both / "out", "--out", both / "no", *words)
    assert message in error


def test_the_run_that_is_gone_on_from_is_not_replaced(both, tmp_path):
    error = refusal("train.py", "--start-from", both / "out", "--out", f"{both}/../{both.name}/out")
    assert "--out would replace the run that --start-from begins with" in error
    error = refusal("train.py", "--start-from", tmp_path, "--out", tmp_path / "new")
    assert "holds no readable run.json" in error


def test_an_adapter_of_another_base_is_refused(both, tmp_path):
    shutil.copytree(both / "out", tmp_path / "out")
    hugging_face_model(tiny_config(vocab_size=256, tie_word_embeddings=True), tmp_path / "other", seed=3)
    shutil.copy(both / "model" / "tokenizer.json", tmp_path / "other")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    record["options"]["model"] = str(tmp_path / "other")
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    seal_again(tmp_path / "out")
    error = refusal("train.py", "--start-from", tmp_path / "out", "--out", tmp_path / "new")
    assert "was trained on model, which other is not" in error


def test_anybodys_guesses_stand_beside_the_models(both, tmp_path):
    shutil.copytree(both / "out", tmp_path / "out")  # whose report other tests read
    test, _ = priced_items(both)
    with open(tmp_path / "mine.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([["id", "guess"]] + [[item.id, item.price] for item in test[::-1]])
    command = ["evaluate.py", "--ckpt", tmp_path / "out", "--quiet", "--no-untuned", "--guesses"]
    out, _ = run(*command, f"me={tmp_path}/mine.csv")
    mine = metrics_of(tmp_path)["comparison"]["me"]
    assert mine["mae"] == pytest.approx(0, abs=0.01) and mine["above"]["ci95"][1] < 0
    assert any(line.startswith("me ") and " - " in line for line in out.splitlines())
    (tmp_path / "mine.csv").write_text("id,guess\nx,1\n")
    assert "mine.csv lacks" in refusal(*command, f"me={tmp_path}/mine.csv")


WRONG = {
    ("--mix", "1", "2"): "--mix takes a share greater than 0 for each source",
    ("--data", "a.jsonl", "b.jsonl", "--mix", "1"): "--mix takes a share greater than 0 for each source",
    ("--data", "a.jsonl", "b.jsonl", "--mix", "1", "0"): "--mix takes a share greater than 0 for each source",
    ("--data", "a.jsonl", "b.jsonl", "--mix", "1", "nan"): "--mix takes a share greater than 0 for each source",
    ("--max-tokens", "0"): "--max-tokens must be at least 1",
}


@pytest.mark.parametrize("words, message", WRONG.items())
def test_options_that_do_not_fit_end_in_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        training_options("train", list(words))
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_one_source_is_a_name_and_several_are_a_list():
    assert training_options("train", []).data == "catalogue"
    assert training_options("train", ["--data", "a.jsonl"]).data == "a.jsonl"
    assert training_options("train", ["--data", "a.jsonl", "pc-parts"]).data == ["a.jsonl", "pc-parts"]
