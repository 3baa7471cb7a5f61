"""What a base model is made of, kept in run.json, so that another one under the same name is refused.

    identity = base_identity("smollm2", directory)     weights, config.json and tokenizer, a sha256 each
    check_base(run, directory, "out")                  of run.json; runs of before this have no digest and pass
"""

import hashlib
import json
from pathlib import Path

from common.hub import sha256
from common.shards import check_weights, weights_digest

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# Keys of config.json that change nothing of what the network computes.
IDLE = ("torch_dtype", "dtype", "transformers_version", "_name_or_path", "architectures", "use_cache")


def base_identity(name: str, directory: Path) -> dict:
    """What run.json holds of a base model. Raises ValueError where a file of it is missing or damaged."""
    return {
        "name": name,
        "directory": directory.name,
        "sha256": weights_digest(directory),
        **_small_files(directory),
    }


def check_base(run: dict, directory: Path, who: str | Path) -> None:
    """Raises ValueError, in one line, where `directory` does not hold what the run `who` was trained on. `run` is its
    run.json."""
    known = run.get("base_model") or {}
    if "sha256" not in known:
        return
    for key, value in _small_files(directory).items():
        if known.get(key, value) != value:
            file = "config.json" if key == "config" else "tokenizer"
            raise ValueError(f"{who} was trained on another base model than {directory} holds: its {file} differs")
    check_weights(directory, known["sha256"], who)


def _small_files(directory: Path) -> dict[str, str]:
    raw = json.loads((directory / "config.json").read_bytes())
    said = json.dumps({key: value for key, value in raw.items() if key not in IDLE}, sort_keys=True)
    parts = [f"{file} {sha256(directory / file)}" for file in TOKENIZERS if (directory / file).is_file()]
    return {
        "config": hashlib.sha256(said.encode()).hexdigest(),
        "tokenizer": hashlib.sha256("\n".join(parts).encode()).hexdigest(),
    }
