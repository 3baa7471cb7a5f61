"""`python -m pricing.head`, the command of earlier versions: it trained a price head after the run. It only says so."""

import sys

if __name__ == "__main__":
    print(
        "error: the price head is trained with the adapter now, by train.py --head quantile (the default)",
        file=sys.stderr,
    )
    sys.exit(2)
