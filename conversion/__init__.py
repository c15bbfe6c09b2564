"""Released SAM 3 and EfficientSAM3 files to folders that `from_pretrained` reads, and back."""
