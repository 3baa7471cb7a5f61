"""Items: where they come from, what is asked about them, how they are packed into batches."""
