"""The task: a product's text in, whole dollars out. Nothing here imports the network; it is passed in as functions."""
