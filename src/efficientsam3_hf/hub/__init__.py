"""Folders and the Hub: model cards, records of what was measured and trained, licences."""
