"""How synthetic things move through a clip."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .synthetic_shapes import Thing
from .synthetic_world import World

Place = tuple[float, float]

# What can happen in a clip; in the last, nothing but that things drift.
EVENTS = ("leave", "cross", "hide", "drift")


@dataclass(frozen=True)
class Path:
    """Where a thing is through a clip.

    Args:
        thing: What moves.
        kind: "drift", "leave" (and come back), "cross", "hide" (behind what passes) or "pass".
        stations: Places it goes through in equal times, on straight lines.
        spin: Radians it turns through the clip.
    """

    thing: Thing
    kind: str
    stations: Sequence[Place]
    spin: float


def place_at(path: Path, time: float) -> Thing:
    """The thing at a time from 0 to 1."""
    position = time * (len(path.stations) - 1)
    index = min(int(position), len(path.stations) - 2)
    share = position - index
    (x1, y1), (x2, y2) = path.stations[index : index + 2]
    centre = (x1 + share * (x2 - x1), y1 + share * (y2 - y1))
    return path.thing.moved(centre, path.spin * time)


def choose_paths(
    things: Sequence[Thing],
    world: World,
    generator: np.random.Generator,
    events: Sequence[str] = EVENTS,
) -> list[Path]:
    """A path for each thing, from back to front; most events are hard for a tracker.

    Args:
        things: To move.
        world: That they are of.
        generator: Of random numbers.
        events: One of them happens; one that is named twice is twice as likely.
    """
    rest = list(things)
    back: list[Path] = []
    front: list[Path] = []
    event = events[int(generator.integers(len(events)))]
    spins = generator.uniform(-1.2, 1.2, len(rest))

    if event == "leave":
        thing = rest.pop()
        inside, outside = leave_places(thing, generator)
        path = Path(thing, "leave", (inside, outside, outside, inside), spins[-1])
        front.append(path)
    elif event == "cross" and len(rest) >= 2:
        # Two of a kind, so that only their motion tells which is which afterwards.
        first = rest.pop()
        second = replace(first, radius=first.radius * 0.95)
        rest.pop()
        height = generator.uniform(0.3, 0.7)
        tilt = generator.uniform(-0.15, 0.15)
        west, east = (0.15, height - tilt), (0.85, height + tilt)
        front += [
            Path(first, "cross", (west, east), spins[-1]),
            Path(second, "cross", (east, west), spins[-2]),
        ]
    elif event == "hide" and len(rest) >= 2:
        sizes = sorted(world.sizes, key=lambda size: world.sizes[size])
        small, large = sizes[0], sizes[-1]
        hidden = replace(rest.pop(), radius=world.sizes[small][0], size=small)
        screen = replace(rest.pop(), radius=world.sizes[large][1], size=large)
        if "square" in world.shapes:
            screen = replace(screen, shape="square")
        x, y = generator.uniform(0.35, 0.65, 2)
        back.append(Path(hidden, "hide", ((x, y), (x + 0.04, y)), 0.0))
        stations = ((x - 0.6, y), (x, y), (x + 0.6, y))
        front.append(Path(screen, "pass", stations, 0.0))
    for thing, spin in zip(rest, spins, strict=False):
        start = np.asarray(thing.centre)
        places = [start]
        for _ in range(2):
            places.append(np.clip(places[-1] + generator.uniform(-0.35, 0.35, 2), 0.08, 0.92))
        stations = tuple((float(x), float(y)) for x, y in places)
        back.append(Path(thing, "drift", stations, spin))
    return back + front


def leave_places(thing: Thing, generator: np.random.Generator) -> tuple[Place, Place]:
    """A place inside, and one beside it so far out that nothing is seen."""
    along, depth = generator.uniform(0.25, 0.75), generator.uniform(0.25, 0.5)
    away = -1.5 * thing.radius - 0.02
    sides = (
        ((depth, along), (away, along)),
        ((1 - depth, along), (1 - away, along)),
        ((along, depth), (along, away)),
        ((along, 1 - depth), (along, 1 - away)),
    )
    return sides[generator.integers(4)]
