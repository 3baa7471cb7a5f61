"""`python -m pricing.curation raw.jsonl.gz --out items.parquet`; curate.py explains it."""

from pricing.curation.curate import main

if __name__ == "__main__":
    main()
