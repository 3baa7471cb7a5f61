"""What waits in the host's memory: the embedding.

    python -m pytest tests/fast/test_offload.py
"""

import torch
from kernel_helpers import DEVICE

from fast.offload import HostEmbedding


def test_rows_of_an_embedding_in_the_hosts_memory(monkeypatch):
    """Tokens may be a slice; without Triton's kernel the rows are copied."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    embedding = HostEmbedding(torch.randn(50, 24), DEVICE == "cuda")
    tokens = torch.randint(0, 50, (6, 4), device=DEVICE)[:, 1]
    for kernels in (False, embedding.kernels):
        embedding.kernels = kernels
        assert torch.equal(embedding(tokens).cpu(), embedding.weight[tokens.cpu()])
