"""How far off the guesses are: metrics, baselines, the report, and what is printed."""
