"""From a teacher to a student: caches, losses, and one trainer for each stage."""
