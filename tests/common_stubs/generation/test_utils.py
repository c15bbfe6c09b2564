"""Stands in for transformers' generation tests: no model here generates text."""


class GenerationTesterMixin:
    pass
