"""Quantised linears: NF4 and int8 in plain PyTorch (nf4.py, int8.py) and the layer that computes with it (linear.py)."""
