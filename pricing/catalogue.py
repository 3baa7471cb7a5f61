"""`python -m pricing.catalogue`: the earlier name of `python -m pricing.data.catalogue`, with the same options."""

from pricing.data.catalogue import main

if __name__ == "__main__":
    main()
