"""`python -m pricing.curation raw.jsonl.gz --out items.parquet`: see curate.py."""

from pricing.curation.curate import main

if __name__ == "__main__":
    main()
