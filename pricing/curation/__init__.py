"""Raw listings to a file to train on: filtered, deduplicated, balanced, split."""
