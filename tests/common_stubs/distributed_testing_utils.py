"""Stands in for helpers of transformers' tensor-parallel, expert-parallel and FSDP tests.

Those tests start only where there are several accelerators. Their modules can be imported; a test
that does run says what it lacks.
"""


def __getattr__(name: str):
    if name.startswith("__"):  # asked for by the import system
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(
            f"{name} is not in the source distribution of transformers; run its distributed tests "
            "from a clone of transformers."
        )

    return missing
