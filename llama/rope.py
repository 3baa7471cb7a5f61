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

from llama.attention import Layout
from llama.config import LinearRope, LlamaConfig, LongRope, RopeScaling


def inverse_frequencies(config: LlamaConfig, long: bool = False) -> Tensor:
    """Radians a token for each pair, theta^(-2i / D), stretched for a longer context  # (D/2,) float32

    Llama 3.1 (`rope_type: llama3`): pairs that turn fast (wavelength < original / high_freq_factor) stay as they are,
    slow ones (wavelength > original / low_freq_factor) turn `factor` times slower, and those between are blended
    linearly. Gemma 3 (`linear`): all turn `factor` times slower. Phi-3 (`longrope`): pair i turns short_factor[i]
    times slower, or long_factor[i] times with `long`.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    scaling = config.rope_scaling
    if isinstance(scaling, LongRope):
        divisor = torch.tensor(scaling.long_factor if long else scaling.short_factor)
        return 1.0 / (divisor * config.rope_theta**exponent)
    frequency = 1.0 / config.rope_theta**exponent  # (D/2,)
    if isinstance(scaling, LinearRope):
        return frequency / scaling.factor
    if not isinstance(scaling, RopeScaling):
        return frequency
    wavelength = 2 * math.pi / frequency  # tokens a turn
    turns = scaling.original_max_position_embeddings / wavelength  # in the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)  # 1: fast, kept; 0: slow, divided
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def all_frequencies(config: LlamaConfig) -> Tensor:
    """What a model keeps: row 0 as above; row 1 Phi-3's long factors, or Gemma 3's local theta  # (1 or 2, D/2)"""
    rows = [inverse_frequencies(config)]
    if isinstance(config.rope_scaling, LongRope):
        rows.append(inverse_frequencies(config, long=True))
    elif config.local_rope_theta is not None:
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        rows.append(1.0 / config.local_rope_theta**exponent)  # never stretched
    return torch.stack(rows)


def rotary_table(frequency: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, float32: bfloat16 would blur positions beyond 256  # (N, 1, D/2) each

    frequency (D/2,), or (N, 1, D/2) where tokens differ.
    """
    angle = positions.float()[:, None, None] * frequency  # (N, 1, D/2); the 1 broadcasts over heads
    return angle.cos(), angle.sin()


def rotary_tables(config: LlamaConfig, frequency: Tensor, layout: Layout) -> tuple:
    """(table of the layers with full attention, table of those with a window), often one and the same

    Phi-3 has two sets of frequencies, for sequences up to the original context and for longer ones. Each sequence
    takes its own by its own length, so that neither packing nor a neighbour changes its numbers (transformers takes
    the long set for a whole batch as soon as one position in it is beyond). Within a cache the prompt's length, shared
    prefix included, decides, and tokens grown on it go on with the prompt's: cached keys cannot be turned anew.
    """
    scaling = config.rope_scaling
    if isinstance(scaling, LongRope):
        long = layout.sequence_lengths()[:, None, None] > scaling.original_max_position_embeddings  # (N, 1, 1)
        cos, sin = rotary_table(torch.where(long, frequency[1], frequency[0]), layout.positions)
        return ((cos * scaling.attention_factor, sin * scaling.attention_factor),) * 2
    table = rotary_table(frequency[0], layout.positions)
    return table, table if len(frequency) == 1 else rotary_table(frequency[1], layout.positions)


def changes_with_length(config: LlamaConfig, before: int, after: int) -> bool:
    """Whether keys turned in a sequence of `before` tokens would be turned otherwise in one of `after`"""
    scaling = config.rope_scaling
    return isinstance(scaling, LongRope) and before <= scaling.original_max_position_embeddings < after


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) to (a cos - b sin, b cos + a sin).  (N, H, D) -> (N, H, D) float32"""
    a, b = x.float().chunk(2, dim=-1)  # split halves, (N, H, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
