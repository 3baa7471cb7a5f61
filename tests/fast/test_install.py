"""The one door of fast/: what it installs where kernels are missing.

    python -m pytest tests/fast/test_install.py
"""

import torch
from conftest import our_model

from fast import install as door
from fast.layers import PLAIN
from llama.model import Llama


def test_without_triton_or_a_compiler_no_kernel_runs(tiny, monkeypatch):
    """On a GPU; the merged linears stay, what lies between them is plain PyTorch, and nothing is recorded."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(door.shutil, "which", lambda name: None)
    monkeypatch.setattr(Llama, "device", torch.device("cuda"))
    for triton, missing in ((None, "(no Triton)"), (object(), "(no C compiler")):
        model = our_model(tiny[1])
        monkeypatch.setattr(door, "triton", triton)
        assert missing in door.install(model) and model.run_layers.pieces is PLAIN and not door.can_record(model)
        assert all(linear.joined is None for linear in model.run_layers.linears)
    monkeypatch.setenv("CC", "cc")
    assert door.kernels_missing() is None
