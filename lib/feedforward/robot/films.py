"""Rollouts as moving pictures: from a camera where there is a renderer, drawn where there is none.

The simulation is deterministic, so that an attempt needs no images to be watched later: its actions
are carried out again from its start.

Explained in ``book/adamoe/01-a-policy-that-flows``.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from feedforward.files import atomic_write
from feedforward.robot.lerobot import encode
from feedforward.robot.rendering import choose_backend
from feedforward.robot.rollout import Attempt
from feedforward.robot.tasks import (
    CONTROL_HZ,
    Environment,
    Images,
    find_task,
    make_environment,
    scene,
)

# the goal is a ring, so that what lies in it is seen
_MARKS = {
    "object": {"color": "tab:orange", "markersize": 5},
    "second": {"color": "tab:green", "markersize": 5},
    "goal": {"color": "tab:red", "markersize": 9, "markeredgewidth": 2, "fillstyle": "none"},
}


def film(
    attempt: Attempt, *, size: int = 240, camera: str = "corner2", every: int = 4
) -> np.ndarray:
    """The frames of an attempt (F, size, size, 3) uint8, by the renderer that there is, or drawn.

    Args:
        attempt: From ``roll_out``.
        size: Height and width in pixels.
        camera: That looks, where something renders; ALOHA's has other names, see ``Images``.
            LIBERO, which shows no images here, is drawn.
        every: Steps from one frame to the next; the last step is always among them.

    Raises:
        ValueError: When `every` is below 1 or there is no such camera.
    """
    shown = find_task(attempt.start.task).simulator.environment.shows_images
    rendered = shown and choose_backend() != "none"
    return (rendered_frames if rendered else drawn_frames)(
        attempt, size=size, every=every, **({"camera": camera} if rendered else {})
    )


def rendered_frames(
    attempt: Attempt, *, size: int = 240, camera: str = "corner2", every: int = 4
) -> np.ndarray:
    """The frames of an attempt from a camera; see `film`.

    Raises:
        RendererError: When there is no OpenGL.
    """
    images = Images(size, (camera,))
    return np.stack(
        [frame for _, frame in _again(attempt, every, lambda _, seen: seen.images[camera], images)]
    )


def drawn_frames(attempt: Attempt, *, size: int = 240, every: int = 4) -> np.ndarray:
    """The frames of an attempt drawn from where the robot's parts and the objects are; see `film`.

    The arms are seen from the side and from above, with the objects as dots and the goal as a ring,
    which in ALOHA is where the left gripper is.
    """
    from matplotlib.style import context

    # whatever style is set for figures, a film looks the same
    with context("default"):
        return np.stack(list(_drawn(attempt, size, every)))


def _drawn(attempt: Attempt, size: int, every: int) -> Iterator[np.ndarray]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size / 100, size / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(2, 1)
    figure.subplots_adjust(0, 0, 1, 1, 0, 0)
    task = find_task(attempt.start.task)
    drawn = task.simulator.environment
    for step, bodies in _again(attempt, every, lambda environment, _: environment.bodies()):
        here = scene(attempt.states[step], task.simulator)
        parts = np.stack(list(bodies.values()))
        for axis, (name, x, y, x_limits, y_limits) in zip(axes, drawn.views, strict=True):
            axis.clear()
            axis.set(xlim=x_limits, ylim=y_limits, xticks=[], yticks=[])
            for *arm, left, right in np.split(parts, drawn.arms):
                arm = np.array(arm)
                axis.plot(arm[:, x], arm[:, y], "-o", color="0.3", linewidth=2, markersize=3)
                for finger in (left, right):
                    axis.plot(*zip(arm[-1, [x, y]], finger[[x, y]], strict=True), color="0.3")
            for mark, look in _MARKS.items():
                place = getattr(here, mark)
                if mark != "second" or place.any():
                    axis.plot(*place[[x, y]], "o", **look)
            axis.text(0.02, 0.95, name, transform=axis.transAxes, fontsize=7, va="top")
        axes[0].text(
            0.98, 0.95, f"{step}", transform=axes[0].transAxes, fontsize=7, va="top", ha="right"
        )
        canvas.draw()
        yield np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _again(
    attempt: Attempt,
    every: int,
    look: Callable[[Environment, object], object],
    images: Images | None = None,
) -> Iterator[tuple[int, object]]:
    """Carry an attempt out again, and look at every so manieth step and the last."""
    if every < 1:
        raise ValueError(f"every is {every}; it must be at least 1")
    with closing(make_environment(attempt.start.task, images=images)) as environment:
        seen = environment.reset(attempt.start.start_state)
        yield 0, look(environment, seen)
        for step, action in enumerate(attempt.actions, start=1):
            seen = environment.step(action)
            if step % every == 0 or step == len(attempt):
                yield step, look(environment, seen)


def save_video(frames: np.ndarray, path: str | os.PathLike, *, fps: float = CONTROL_HZ / 4) -> None:
    """Write frames (F, H, W, 3) uint8 as an mp4, whole or not at all.

    Args:
        frames: From `film`.
        path: Of the file.
        fps: Frames a second.

    Raises:
        VideoError: When there is no encoder.
    """
    with atomic_write(path) as file:
        file.write(encode(frames, fps, lossless=False).data)


def save_gif(
    frames: np.ndarray,
    path: str | os.PathLike,
    *,
    fps: float = CONTROL_HZ / 4,
    colours: int = 64,
) -> Path:
    """Write frames (F, H, W, 3) uint8 as a GIF that goes round, whole or not at all.

    Args:
        frames: From `film`.
        path: Of the file.
        fps: Frames a second, at most 50.
        colours: Of each frame, at most 256; fewer make a smaller file.

    Returns:
        The path.

    Raises:
        ValueError: When there is no frame, or a number is out of range.
    """
    from PIL import Image

    if not len(frames) or not 0 < fps <= 50 or not 2 <= colours <= 256:
        raise ValueError(
            f"{len(frames)} frames at {fps} a second in {colours} colours: give a frame, at most "
            "50 a second, and from 2 to 256 colours"
        )
    pictures = [Image.fromarray(frame).quantize(colours) for frame in frames]
    written = io.BytesIO()
    pictures[0].save(
        written,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 / fps),
        loop=0,
    )
    with atomic_write(path) as file:
        file.write(written.getvalue())
    return Path(path)
