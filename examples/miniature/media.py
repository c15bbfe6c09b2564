"""The picture and the clip of examples/media, out of the validation split of the world.

Of 700 of either they are ones that the shipped student does well on.

python -m examples.miniature.media
"""

from pathlib import Path

from PIL import Image

from efficientsam3_hf.data.synthetic import Clips, Scenes
from efficientsam3_hf.data.video import import_av

from .world import MOST_THINGS, WORLD

MEDIA = Path(__file__).parents[1] / "media"
SCENE, CLIP = "scene.jpg", "clip.mp4"
# Larger than what models see, so that they are good to look at.
SCENE_SIDE, CLIP_SIDE = 480, 320
SCENE_NUMBER = 522  # two red stars, a yellow star, a red square
CLIP_NUMBER = 443  # two yellow squares among others
FRAMES, FPS = 24, 12


def write_media(folder: Path = MEDIA) -> None:
    """Draw both and write them."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = Scenes(
        SCENE_NUMBER + 1, "val", side=SCENE_SIDE, least=MOST_THINGS, most=MOST_THINGS, world=WORLD
    )
    Image.fromarray(scenes[SCENE_NUMBER].image).save(folder / SCENE, quality=90)
    clips = Clips(
        *(CLIP_NUMBER + 1, "val"),
        side=CLIP_SIDE,
        num_frames=FRAMES,
        least=3,
        most=MOST_THINGS,
        world=WORLD,
    )
    av = import_av()
    with av.open(str(folder / CLIP), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width = stream.height = CLIP_SIDE
        stream.pix_fmt = "yuv420p"
        for pixels in clips[CLIP_NUMBER].frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    write_media()
    print(f"{MEDIA} has {SCENE} and {CLIP}.")
