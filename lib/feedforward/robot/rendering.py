"""Images of the simulator on machines without a display.

MuJoCo draws with OpenGL, and which OpenGL it takes is settled when it is first imported. So
`choose_backend` looks for one before that: EGL where there is a graphics card, else OSMesa or EGL,
whichever is installed. Without any, the simulation works all the same and images are refused with
`RendererError`, which says how to get a renderer.
"""

import atexit
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from ctypes.util import find_library
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from feedforward.profiles import unknown

if TYPE_CHECKING:
    import mujoco

_OFF = ("disable", "disabled", "off", "false", "0")
_DEVICES = ("nvidia0", "dri/renderD128")
_INSTALL = (
    "On Debian or Ubuntu: apt-get install libosmesa6, or libegl1 and libgl1; then start Python "
    "anew, and import feedforward.robot before mujoco, or set MUJOCO_GL. Without a renderer, "
    "states, success and positions work, and images do not."
)


class RendererError(RuntimeError):
    """There is no OpenGL to draw images with; the message says how to get one."""


def choose_backend() -> str:
    """Settle what MuJoCo draws with, before it is imported; afterwards tell what was settled.

    ``MUJOCO_GL`` and ``PYOPENGL_PLATFORM`` are respected where they are set.

    Returns:
        ``"egl"``, ``"osmesa"``, ``"glfw"`` (a window system draws) or ``"none"``.
    """
    if "mujoco" in sys.modules:
        return _backend_of_mujoco()
    if sys.platform != "linux":
        return "glfw"
    if given := os.environ.get("MUJOCO_GL", "").strip().lower():
        backend = "none" if given in _OFF else given if given in ("egl", "osmesa") else "glfw"
    else:
        backend = _best_backend()
        os.environ["MUJOCO_GL"] = "disable" if backend == "none" else backend
    if backend == "osmesa":
        _load_triton()
    return backend


@cache
def _load_triton() -> None:
    """Load Triton, which comes with PyTorch for CUDA, before OSMesa.

    Both bring an LLVM, and Triton's, which the first optimizer loads, ends the process where
    OSMesa's is there already.
    """
    with suppress(ImportError):
        import_module("triton._C.libtriton")


@contextmanager
def loading_simulator() -> Iterator[None]:
    """Import a simulator in the block: what draws is settled before it.

    Raises:
        ImportError: When it does not load; the message says how to install it.
    """
    choose_backend()
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"the simulator does not load ({error}): pip install 'feedforward[robot]'"
        ) from error


def _best_backend() -> str:
    installed = {
        "egl": find_library("EGL") and (find_library("OpenGL") or find_library("GL")),
        "osmesa": find_library("OSMesa"),
        "glfw": os.environ.get("DISPLAY"),
    }
    card = any(Path("/dev", device).exists() for device in _DEVICES)
    order = ("egl", "osmesa", "glfw") if card else ("osmesa", "egl", "glfw")
    platform = os.environ.get("PYOPENGL_PLATFORM", "").lower()
    if platform in ("egl", "osmesa"):  # OpenGL for Python is bound to it, so MuJoCo is, too
        order = (platform,)
    return next((name for name in order if installed[name]), "none")


def _backend_of_mujoco() -> str:
    from mujoco import gl_context

    context = getattr(gl_context, "GLContext", None)
    name = context.__module__.rpartition(".")[2] if context else "none"
    # what MuJoCo takes when nothing was settled needs a window system
    headless = sys.platform == "linux" and not os.environ.get("DISPLAY")
    return "none" if name == "glfw" and headless else name


_open: "weakref.WeakSet[Renderer]" = weakref.WeakSet()
# MuJoCo's renderers that nobody closed and nobody has any more
_forgotten: "list[mujoco.Renderer]" = []


def _close_all() -> None:
    for renderer in list(_open):
        renderer.close()
    _free_forgotten()


@cache
def _close_all_at_exit() -> None:
    """Called with a first renderer open, for what is registered last is done first at the exit.

    Graphics contexts must go before their library ends, which MuJoCo has registered just now.
    """
    atexit.register(_close_all)


class Renderer:
    """Draws a scene from its cameras, fast: no shadows, reflections, sky or multisampling.

    At 84 x 84 pixels a step of the simulation and its frame take about 10 ms on one CPU core;
    with MuJoCo's defaults the frame alone takes ten times that.

    Args:
        model: The scene.
        size: Height and width of an image, in pixels.
        cameras: Their names in the scene. A camera that is fixed upside down, as Meta-World's
            ``corner2`` is, is turned, so that up is up.

    Raises:
        RendererError: When there is no OpenGL.
        ValueError: When the scene has no such camera.
    """

    def __init__(self, model: "mujoco.MjModel", *, size: int, cameras: Sequence[str]):
        backend = choose_backend()
        if backend == "none":
            raise RendererError(f"there is no OpenGL to draw images with. {_INSTALL}")
        import mujoco

        names = [model.camera(place).name for place in range(model.ncam)]
        for camera in cameras:
            if camera not in names:
                raise ValueError(unknown("camera", camera, names))
        self._turned = {camera: _is_upside_down(model, camera) for camera in cameras}
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size)
        _free_forgotten()
        try:
            self._renderer = mujoco.Renderer(model, height=size, width=size)
        except Exception as error:  # each OpenGL has errors of its own
            raise RendererError(
                f"OpenGL by {backend} does not start ({type(error).__name__}: {error}). "
                f"MUJOCO_GL=osmesa or MUJOCO_GL=egl, set before Python starts, chooses another. "
                f"{_INSTALL}"
            ) from error
        _close_all_at_exit()
        _open.add(self)
        flags = self._renderer.scene.flags
        for flag in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE"):
            flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = False

    def __call__(self, data: "mujoco.MjData") -> dict[str, np.ndarray]:
        """The images of all cameras: by name (size, size, 3) uint8, red, green and blue."""
        _free_forgotten()
        images = {}
        for camera, turned in self._turned.items():
            self._renderer.update_scene(data, camera)
            image = self._renderer.render()
            images[camera] = np.ascontiguousarray(image[::-1, ::-1]) if turned else image
        return images

    def close(self) -> None:
        """Free what the graphics library holds."""
        _free(self._renderer)
        _open.discard(self)

    def __del__(self):
        # at any time, in the middle of another's drawing too: only kept from being freed now
        if hasattr(self, "_renderer"):
            _forgotten.append(self._renderer)


def _free(renderer: "mujoco.Renderer") -> None:
    """Close MuJoCo's renderer in its own OpenGL context.

    Left to itself it frees the context first, and then, by their numbers, textures and buffers of
    whichever context is current: those of another renderer, which goes on drawing garbage.
    """
    if renderer._gl_context and renderer._mjr_context:
        renderer._gl_context.make_current()
        renderer._mjr_context.free()
        renderer._mjr_context = None
    renderer.close()


def _free_forgotten() -> None:
    while _forgotten:
        _free(_forgotten.pop())


def _is_upside_down(model: "mujoco.MjModel", camera: str) -> bool:
    """Whether the top of the image of a camera that does not move points to the ground."""
    import mujoco

    place = model.camera(camera).id
    if model.cam_bodyid[place] != 0:
        return False
    rotation = np.empty(9)
    mujoco.mju_quat2Mat(rotation, model.cam_quat[place])
    return bool(rotation.reshape(3, 3)[2, 1] < 0)
