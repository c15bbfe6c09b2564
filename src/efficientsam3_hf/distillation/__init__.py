"""From SAM 3 to students: the teacher, its cache, and one trainer for each stage."""
