"""Configurations, models and processors: a flat folder that also works as remote code on the Hub.

Files import one another with one dot, and nothing else of the package.
"""
