"""From logits to a distribution over prices, and the losses that teach it."""
