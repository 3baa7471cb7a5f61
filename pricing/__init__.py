"""The task: a product's text in, whole dollars out. Nothing here knows the network; it arrives as functions."""
