"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864): positions as rotations of pairs of numbers in q and k.

Pair i of a head turns by the angle  position * theta^(-2i / D).  A dot product of two rotated vectors then depends
only on the distance between their positions.

Which two numbers form a pair is a convention, and mixing them up gives no error, only a poor model:

    split halves (Hugging Face, here):  (x0, x[D/2]), (x1, x[D/2 + 1]), ...     weights as in safetensors
    interleaved  (Meta, GGUF):          (x0, x1), (x2, x3), ...                 q and k rows permuted, see gguf.py
"""

import math

import torch
from torch import Tensor

from llama.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """Radians a token for each pair, theta^(-2i / D), stretched for Llama 3.1's long context  # (D/2,) float32

    Llama 3.1 (`rope_type: llama3`): pairs that turn fast (wavelength < original / high_freq_factor) stay as they are,
    slow ones (wavelength > original / low_freq_factor) turn `factor` times slower, and those between are blended
    linearly.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent  # (D/2,)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency  # tokens a turn
    turns = scaling.original_max_position_embeddings / wavelength  # in the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)  # 1: fast, kept; 0: slow, divided
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def rotary_table(frequency: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, float32: bfloat16 would blur positions beyond 256  # (N, 1, D/2) each"""
    angle = positions.float()[:, None, None] * frequency  # (N, 1, D/2); the 1 broadcasts over heads
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) to (a cos - b sin, b cos + a sin).  (N, H, D) -> (N, H, D) float32"""
    a, b = x.float().chunk(2, dim=-1)  # split halves, (N, H, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
