"""Models run on datasets, and their answers scored: what `efficientsam3 evaluate` does."""
