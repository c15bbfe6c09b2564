"""From disk to samples, and back. Knows no model."""
