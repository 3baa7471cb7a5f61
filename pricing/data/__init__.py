"""Items: their sources, the prompt around their text, and how they are packed into batches."""
