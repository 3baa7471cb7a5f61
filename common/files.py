"""A file under its name only when it is whole."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path beside `path`, to write to: on disk and renamed to `path` when the block ends, gone where it raises.

    An older `path` stays as it was until then. Readable by all, as any file that is simply opened.
    """
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as made:
        part = Path(made.name)
    try:
        yield part
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        part.chmod(0o644)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
