"""The command line: `efficientsam3`, or `python -m efficientsam3_hf.cli`.

Each command is a file of its own, and imports what is heavy when it runs, so that `--help` is fast.
"""
