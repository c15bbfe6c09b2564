"""What configurations with others inside have in common."""

from typing import Any


class CompositeConfig:
    """Leaves out of what is saved where nested configurations come from."""

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, less what nested configurations remember of their last checkpoint.

        Their precision is the whole model's, and where they were loaded from is nobody's business.
        """
        return {
            name: without_origin(value) if isinstance(value, dict) else value
            for name, value in super().to_dict().items()  # pyright: ignore  of PreTrainedConfig
        }


def without_origin(nested: dict[str, Any]) -> dict[str, Any]:
    """The dictionary of a nested configuration without the path and precision of a checkpoint."""
    forgotten = {"_name_or_path": "", "dtype": None}
    return {
        name: without_origin(value) if isinstance(value, dict) else forgotten.get(name, value)
        for name, value in nested.items()
    }


def check_equal_widths(widths: dict[str, int]) -> None:
    """Raise if the parts that hand features to one another differ in width."""
    if len(set(widths.values())) > 1:
        listing = ", ".join(f"{name}={width}" for name, width in widths.items())
        raise ValueError(f"These widths must be equal: {listing}.")
