"""A teacher, the configuration of a student, pictures and phrases: all that a folder takes."""

from pathlib import Path

from distillation.worlds import tiny_teacher
from tiny import TINY_TEXT, tiny_config, tiny_video_config, tiny_vision

from efficientsam3_hf import zoo
from efficientsam3_hf.data.files import write_image
from efficientsam3_hf.data.synthetic import Scenes

PHRASES = ["a red circle", "a small violet box", "dog", "green ring", "food"]
# Between which random weights hesitate: some phrases are present, some absent, some doubtful.
CONFIDENCE, ABSENT = 0.217, 0.212


def write_world(folder: Path, pictures: int = 12) -> Path:
    """Folders `teacher`, `own_text`, `teachers_text`, `photos`, and `phrases.txt`.

    The text tower of one student is its own, that of the other the teacher's. Among the pictures is
    one that cannot be read.
    """
    tiny_teacher().save(folder / "teacher")
    video = tiny_video_config("perceiver", tiny_vision())
    for name, layers in (("own_text", 2), ("teachers_text", TINY_TEXT["num_hidden_layers"])):
        text = {**TINY_TEXT, "num_hidden_layers": layers}
        config = tiny_config(tiny_vision(), text, tracker_video_config=video)
        config.objective = {"mask_points": None}
        zoo.save(config, folder / name)
    scenes = Scenes(pictures, side=112)
    for number in range(pictures):
        image = scenes[number].image
        assert image is not None
        write_image(folder / "photos" / str(number % 3) / f"{number}.png", image)
    (folder / "photos" / "broken.jpg").write_bytes(b"no picture")
    (folder / "phrases.txt").write_text("\n".join(PHRASES) + "\n\n dog \n")
    return folder
