"""From SAM 3 to students: the teacher, its cache, and the stages of training."""
