"""Quantised linears: the formats (nf4.py, int8.py), the layer that computes with them (linear.py), the one call that
quantises (quantise.py)."""

import logging

# On CPUs with avx512_bf16, bitsandbytes logs at import that an optional kernel package is missing; it is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
