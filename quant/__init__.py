"""Quantised linears: NF4 and int8 in plain PyTorch (nf4.py, int8.py), the layers that compute with them (linear.py)."""
