"""What --data names: the catalogue, pc-parts, folders of hub files, downloads."""

import json
import zipfile
from collections import Counter

import pytest
from conftest import shared

from pricing.data import sources
from pricing.data.items import REPEATED, items_from_rows, normalise_title


def row(**changes):
    return {"title": "Steel mug", "price": 12.5, "description": "330 ml"} | changes


def test_no_title_is_in_two_splits():
    items, _, _ = sources.load_items("catalogue", 4000, 0)
    splits = {}
    for item in items:
        splits.setdefault(normalise_title(item.title), set()).add(item.split)
    assert len(splits) > 3000 and all(len(s) == 1 for s in splits.values())


def test_folders_of_hub_files_take_the_split_from_the_name(tmp_path):
    for name in ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"):
        (tmp_path / name).write_text(json.dumps(row(title=name)) + "\n")
    items, _ = items_from_rows(sources.folder_rows(tmp_path), "hub")
    assert sorted(item.split for item in items) == ["test", "train"]


SPLITS = {
    "train/part0": "train", "test/part0": "test", "data/validation/part0": "val", "x_train": "train", "x_test": "test",
    "prices-test": "test", "prices_dev": "val", "eval": "test", "dev": "val", "train-00000-of-00002": "train",
    "Testing data": "test", "test2": "test", "test/x_train": "test", "valid.v2": "val",
    "part0.test": "test", "a/evaluation-set/b/part": "test",
    "valves": None, "trainers_and_sneakers": None, "testimonials": None, "developers/part0": None, "contest": None,
    "train_test_split": None, "latest": None,
}  # fmt: skip


@pytest.mark.parametrize("name, split", SPLITS.items())
def test_splits_are_whole_words_in_names_of_files_and_folders(tmp_path, name, split):
    path = tmp_path / "contest_train" / f"{name}.jsonl"  # the folder that all of it is in says nothing
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(json.dumps(row(title=f"mug {n}", split=s)) for n, s in enumerate(("", None, "val"))))
    rows = [row for _, row in sources.folder_rows(tmp_path / "contest_train")]
    assert [r["split"] for r in rows] == ([split, split, "val"] if split else ["", None, "val"])


@pytest.mark.parametrize("name, words", [("a.json", "json file; write one"), ("a.jsonl.gz", "gz file; unpack it")])
def test_a_folder_of_other_kinds_of_files_is_told_what_to_do(tmp_path, name, words):
    (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match=f"has no .parquet, .jsonl or .csv file; of a .{words}"):
        list(sources.folder_rows(tmp_path))


def test_rows_without_a_split_go_where_they_are_asked_to(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row(title=f"mug {n}", split="val" if n == 3 else "")) for n in range(40)))
    asked = [item.split for item in sources.load_items(str(path), 0, 0, default_split="test")[0]]
    assert asked == ["val" if n == 3 else "test" for n in range(40)]
    assert "train" in {item.split for item in sources.load_items(str(path), 0, 0)[0]}
    assert "train" in {item.split for item in sources.load_items("catalogue", 40, 0, default_split="test")[0]}


def test_pc_parts_equal_the_known_list(tmp_path, monkeypatch):
    """Downloaded (here from a file URL), checked, written out: the 15,489 items of the shared file, no more, no
    less."""
    archive, known = shared("pc-part-dataset-jsonl.zip"), shared("pc_parts.jsonl")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "PC_PARTS_URL", archive.as_uri())
    items, skipped, identity = sources.load_items("pc-parts", 0, 0)
    expected = [json.loads(line) for line in known.read_text().splitlines()]
    assert sorted((i.text, i.price) for i in items) == sorted(
        ("\n".join(" ".join(e[part].split()) for part in ("title", "category", "description") if e[part]), e["price"])
        for e in expected
    )
    assert identity["items"] == 15489 and sum(skipped.counts.values()) == 66_778 - 15_489
    assert not any("price per gb" in item.text for item in items)
    assert sum(item.split == "test" for item in items) >= 1000
    assert [p.suffix for p in tmp_path.iterdir()] == [".zip"]  # nothing half-written left


def test_pc_parts_rows_by_hand(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        part = {
            "name": "Fan",
            "price": 9.5,
            "price_per_gb": 1,
            "rpm": [500, 900],
            "pwm": True,
            "noise_level": None,
            "size": 120,
        }
        archive.writestr(
            "data/case-fan.jsonl", "\n".join([json.dumps(part)] * 2 + [json.dumps(part | {"price": None})])
        )
    rows = list(sources.pc_parts_rows(tmp_path / "a.zip"))
    fan = {"title": "Fan", "category": "case fan", "description": "rpm: 500 / 900; pwm: yes; size: 120", "price": 9.5}
    assert rows[0] == (1, fan | {REPEATED: False})
    items, skipped = items_from_rows(rows, "parts")
    assert len(items) == 1
    assert skipped.counts == {"rows that repeat an earlier one": 1, "rows without a price": 1}


def test_a_changed_or_unreachable_download_leaves_nothing(tmp_path):
    (tmp_path / "source").write_text("something else")
    target = tmp_path / "cache" / "file.zip"
    with pytest.raises(OSError, match="has sha256 .* expected"):
        sources.download((tmp_path / "source").as_uri(), "0" * 64, target)
    with pytest.raises(OSError, match="cannot fetch"):
        sources.download((tmp_path / "absent").as_uri(), "0" * 64, target)
    assert list(target.parent.iterdir()) == []


def write_items(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def two(tmp_path):
    """A shop of 10 items to train on, 2 to validate and 3 to test; another of 8, 2 of them in its own test split"""
    splits = ["train"] * 10 + ["val"] * 2 + ["test"] * 3
    words = "amber birch cedar delta ember flint grove heath ivory jade knoll larch maple north opal".split()
    ours = [{"title": f"{words[n]} mug", "description": f"mug number {n} of {words[-n]} clay", "price": 5, "split": s}
            for n, s in enumerate(splits)]  # fmt: skip
    theirs = [{"title": f"lamp {n} {words[n]}", "price": 9, "split": "test" if n < 2 else "train"} for n in range(8)]
    theirs[7]["origin"] = "auction"
    return write_items(tmp_path / "mugs.jsonl", ours), write_items(tmp_path / "lamps.jsonl", theirs)


def counts_of(loaded):
    return Counter((item.origin, item.split) for item in loaded.items)


def test_the_first_source_is_tested_on_and_the_others_are_learnt_from(two):
    loaded = sources.load_sources(list(two))
    own = {("mugs", "train"): 10, ("mugs", "val"): 2, ("mugs", "test"): 3}
    assert counts_of(loaded) == own | {("lamps", "train"): 5, ("auction", "train"): 1}  # a row's own origin wins
    assert [len(part["sha256"]) for part in loaded.identity["sources"]] == [64, 64] and loaded.identity["items"] == 21
    named = sources.load_sources(list(two), ["kitchen", "light"])
    assert {item.origin for item in named.items} == {"kitchen", "light", "auction"}
    assert named.items[0].tagged == f"Origin: kitchen\n{named.items[0].text}"
    alone = sources.load_sources(two[0])
    assert {item.origin for item in alone.items} == {""} and alone.items[0].tagged == alone.items[0].text


@pytest.mark.parametrize("mix, lamps", [([1, 1], 10), ([2, 1], 5), ([1, 3], 30), ([50, 10], 2)])
def test_a_mix_takes_the_first_whole_and_samples_or_repeats_the_others(two, mix, lamps):
    items = sources.load_sources(list(two), mix=mix).items
    others = Counter(item.title for item in items if item.origin != "mugs")
    assert sum(item.split == "train" for item in items if item.origin == "mugs") == 10
    assert others.total() == lamps and max(others.values()) - min(others.values()) <= 1
    assert len(others) == min(lamps, 6)


def test_what_repeats_a_held_out_item_is_not_learnt_from(two, tmp_path):
    test = json.loads(open(two[0]).read().splitlines()[-1])
    words = test["description"].split()
    more = [
        {"title": test["title"].upper() + "!", "description": "another text altogether", "price": 4},
        {"text": f"{test['title']}\n{test['description']} Sold by us.", "price": 4},
        {"title": "something else", "description": " ".join(words[::-1]), "price": 4},
    ]
    more[1]["text"] = "\n".join([test["title"], test["description"] + " x"])
    path = write_items(tmp_path / "more.jsonl", [row | {"split": "train"} for row in more])
    loaded = sources.load_sources([two[0], path])
    assert loaded.near == 2 and [item.title for item in loaded.items if item.origin == "more"] == ["something else"]


def test_sources_that_cannot_be_told_apart_are_refused(two, tmp_path):
    with pytest.raises(ValueError, match="two sources of --data are called 'mugs'"):
        sources.load_sources([two[0], two[0]])
    with pytest.raises(ValueError, match="--origin takes a name for each of the 2 sources of --data, got 1"):
        sources.load_sources(list(two), ["mugs"])
    empty = write_items(tmp_path / "none.jsonl", [{"title": "a", "price": 1, "split": "test"}])
    with pytest.raises(ValueError, match="--mix: source 2 of --data has no item to train on"):
        sources.load_sources([two[0], empty], mix=[1, 1])
