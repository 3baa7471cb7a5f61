"""What a user gets wrong, in any of the commands, is one line and exit code 2.

    python -m pytest tests/pipeline/test_errors.py
"""

import json
import shutil

from conftest import hugging_face_model, tiny_config
from trained_run import run, seal_again


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
        seal_again(tmp_path / name)
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
        ([*merge, "--base", other, "--out", tmp_path / "m"], "was trained on another base model than"),
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


def test_data_that_changed_since_training_is_refused(place, tmp_path):
    shutil.copytree(place / "out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    record["data"]["sha256"] = "0" * 64
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    seal_again(tmp_path / "out")
    _, err = run("evaluate.py", "--ckpt", tmp_path / "out", code=2)
    assert "has changed since" in err
