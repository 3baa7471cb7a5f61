"""The same sums as the readable path, in fewer and larger steps. Without this folder all still trains and prices."""
