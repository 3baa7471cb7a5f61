"""The shape of the house: who may import whom, how long a function and a file may be, what is read first.

    python -m pytest tests/test_architecture.py
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {  # package -> the others of ours that it may import
    "common": set(),
    "llama": {"common"},
    "quant": {"common"},
    "pricing": {"common"},
    "lora": {"common", "quant"},
    "fast": {"common", "llama", "quant", "lora"},
    "pipeline": {"common", "llama", "quant", "lora", "fast", "pricing"},
}
SCRIPTS = ("train", "evaluate", "predict")
# Read in an afternoon: the network, the quantised linear, LoRA. Tables, file formats and speed are elsewhere.
READING_CORE = [
    "llama/config.py", "llama/model.py", "llama/attention.py", "llama/rope.py", "llama/logits.py", "llama/weights.py",
    "llama/cache.py", "llama/generate.py", "quant/nf4.py", "quant/linear.py", "quant/quantise.py", "lora/layer.py",
    "lora/inject.py", "lora/adapter.py", "lora/optim.py",
]  # fmt: skip
LONG_FILES = {"pricing/data/catalogue.py", "pipeline/options.py"}  # tables


def sources() -> list[Path]:
    files = [ROOT / f"{script}.py" for script in SCRIPTS]
    return files + [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST) -> list[str]:
    """Every module that is imported, at the top or inside of a function; `from a import b` may be a.b"""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            names += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return names


TREES = {module_of(path): ast.parse(path.read_text()) for path in sources()}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package):
    for module, tree in TREES.items():
        if module.split(".")[0] != package:
            continue
        others = {name.split(".")[0] for name in imports(tree)} & (set(PACKAGES) | set(SCRIPTS))
        assert others - {package} <= PACKAGES[package], f"{module} imports {sorted(others - {package})}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: {name for name in imports(tree) if name in TREES} - {module} for module, tree in TREES.items()}
    done, path = set(), []

    def visit(module):
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module):], module])}"
        if module in done:
            return
        path.append(module)
        for other in sorted(graph[module]):
            visit(other)
        done.add(path.pop())

    for module in graph:
        visit(module)


def test_transformers_and_peft_are_never_imported():
    for module, tree in TREES.items():
        assert not {"transformers", "peft", "llama_cpp"} & {name.split(".")[0] for name in imports(tree)}, module


def test_functions_and_files_stay_short():
    for path in sources():
        name, text = str(path.relative_to(ROOT)), path.read_text()
        assert name in LONG_FILES or text.count("\n") <= (260 if name == "train.py" else 250), name
        for node in ast.walk(TREES[module_of(path)]):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 70, f"{name}: {node.name}"


def test_the_reading_core_takes_an_afternoon():
    lines = {file: (ROOT / file).read_text().count("\n") for file in READING_CORE}
    assert sum(lines.values()) <= 1500, lines


def test_nothing_but_the_three_scripts_stands_at_the_top():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["train.py", "--help"], 0, "python train.py --bits 4 --readable"),
        (["train.py", "--bannana"], 2, "unrecognized arguments: --bannana"),
        (["evaluate.py", "--help"], 0, "python evaluate.py --compare a/report b/report"),
        (["evaluate.py", "--items", "0"], 2, "--items must be at least 1"),
        (["predict.py", "--help"], 0, "--file items.jsonl > prices.csv"),
        (["predict.py"], 2, "give a text or --file, one of the two"),
        (["train.py", "--version"], 0, "train.py 0."),
    ],
)
def test_help_and_typing_errors_are_answered_before_pytorch_is_imported(arguments, code, words):
    """Importing it takes seconds. A module named torch that cannot be imported stands in its way."""
    blocked = "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    blocked += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", blocked, *arguments], cwd=ROOT, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == code and words in output and "Traceback" not in output, output
    assert "(default: None)" not in output


def test_without_the_fast_package_all_still_trains_and_prices(tmp_path, tiny_directory):
    """Three steps and five prices with `fast` blocked, against the fast path: the same numbers up to rounding."""
    rows = [{"title": f"tin {n}", "price": 5 + n % 40, "description": "ring " * (n % 7)} for n in range(90)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--model", tiny_directory, "--data", tmp_path / "items.jsonl", "--max-steps", "3"]
    options += ["--batch-tokens", "512"]
    options += ["--lr", "1e-3", "--dtype", "fp32", "--val-items", "0", "--max-tokens", "120"]
    (tmp_path / "texts.txt").write_text("\n".join(f"tin ring number {n}" for n in range(5)))
    results = []
    for name, blocked in (("fast", ""), ("readable", "sys.modules['fast'] = None; ")):
        start = f"import runpy, sys; sys.path.insert(0, ''); {blocked}sys.argv = sys.argv[1:]; "
        start += "runpy.run_path(sys.argv[0], run_name='__main__')"

        def run(*arguments):
            command = [sys.executable, "-c", start, *map(str, arguments)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr[-1500:]
            return done.stdout

        said = run("train.py", *options, "--out", tmp_path / name)
        assert ("path       readable" in said) == bool(blocked)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        prices = run("predict.py", "--ckpt", tmp_path / name, "--file", tmp_path / "texts.txt", "--dtype", "fp32")
        results.append(([line["loss"] for line in lines], [row.split(",") for row in prices.splitlines()[1:]]))
    (fast_losses, fast_prices), (losses, prices) = results
    assert len(losses) == 3 and losses == pytest.approx(fast_losses, abs=2e-4)
    assert len(prices) == 5
    for row, fast_row in zip(prices, fast_prices, strict=True):
        assert row[0] == fast_row[0]
        assert [float(p) for p in row[1:]] == pytest.approx([float(p) for p in fast_row[1:]], abs=1)


def test_a_fast_package_that_is_broken_is_not_taken_for_a_deleted_one():
    """Else a bad edit, or a PyTorch that it does not fit, would cost the speed in silence."""
    broken = "import sys; sys.modules['fast.layers'] = None; import pipeline.models"
    done = subprocess.run([sys.executable, "-c", broken], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "fast.layers" in done.stderr


def test_a_memory_budget_without_the_fast_package_is_refused(tmp_path, tiny_directory):
    blocked = "import runpy, sys; sys.path.insert(0, ''); sys.modules['fast'] = None; sys.argv = sys.argv[1:]; "
    blocked += "runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = ["train.py", "--model", str(tiny_directory), "--explain-memory", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", blocked, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "the folder fast/ is not there" in done.stderr and not (tmp_path / "out").exists()


def test_the_readme_counts_lines_rightly_and_names_files_that_there_are():
    text = (ROOT / "README.md").read_text()
    counted = re.findall(r"`([\w/]+\.py)` \((\d+) lines\)", text)
    assert len(counted) >= 7 and text.count("\n") <= 130
    for file, lines in counted:
        assert (ROOT / file).read_text().count("\n") == int(lines), file
    packages = "|".join(PACKAGES)
    listed = re.findall(rf"`((?:{packages})/[\w/]+\.py)`", (ROOT / "docs/reading.md").read_text())
    assert listed and all((ROOT / file).is_file() for file in listed)
