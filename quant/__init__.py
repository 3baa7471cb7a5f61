"""Quantised linears: the NF4 format in plain PyTorch (nf4.py) and the layer that computes with it (linear.py)."""
