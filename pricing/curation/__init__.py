"""From raw listings to a file of items to train on: filtered, deduplicated, balanced, split."""
