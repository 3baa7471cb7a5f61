"""LoRA (Hu et al. 2021, arXiv 2106.09685): the layer, its injection into a model, PEFT's on-disk format, merging."""
