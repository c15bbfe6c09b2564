"""From predictions and ground truth to numbers. Knows no model."""
