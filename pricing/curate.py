"""`python -m pricing.curate`: the earlier name of `python -m pricing.curation`, with the same options."""

from pricing.curation.curate import main

if __name__ == "__main__":
    main()
