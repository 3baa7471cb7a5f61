"""How far off in dollars: metrics, baselines, the report, the terminal."""
