"""A renderer is chosen by what is there, and up is up."""

import gc
import subprocess
import sys

import numpy as np
import pytest

from feedforward.robot import rendering
from feedforward.robot.rendering import RendererError, choose_backend
from feedforward.robot.tasks import Images, make_environment


@pytest.fixture
def machine(monkeypatch):
    """Pretend that some libraries, devices and settings are there, and MuJoCo not yet imported."""

    def pretend(libraries=(), devices=(), **settings):
        monkeypatch.setattr(rendering, "find_library", lambda name: name in libraries or None)
        monkeypatch.setattr(rendering, "_DEVICES", devices)
        monkeypatch.delitem(sys.modules, "mujoco", raising=False)
        for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        return choose_backend()

    monkeypatch.setattr(sys, "platform", "linux")
    return pretend


@pytest.mark.parametrize(
    ("libraries", "devices", "expected"),
    [
        (("EGL", "GL"), (), "egl"),
        (("EGL", "OpenGL", "OSMesa"), (), "osmesa"),
        (("EGL", "OpenGL", "OSMesa"), ("null",), "egl"),  # a device that every machine has
        (("EGL",), (), "none"),
        ((), ("null",), "none"),
    ],
)
def test_a_card_draws_by_egl_and_a_processor_by_what_is_there(
    machine, monkeypatch, libraries, devices, expected
):
    import os

    assert machine(libraries, devices) == expected
    assert os.environ["MUJOCO_GL"] == ("disable" if expected == "none" else expected)


def test_settings_are_respected(machine):
    both = ("EGL", "GL", "OSMesa")
    assert machine(both, MUJOCO_GL="egl") == "egl"
    assert machine(both, MUJOCO_GL="off") == "none"
    assert machine(both, PYOPENGL_PLATFORM="egl") == "egl"
    assert machine(("OSMesa",), PYOPENGL_PLATFORM="egl") == "none"
    assert machine((), DISPLAY=":0") == "glfw"


def test_opengl_that_does_not_start_is_an_error_of_its_own(monkeypatch, renderer):
    import mujoco

    def broken(*_, **__):
        raise ImportError("Cannot initialize a EGL device display")

    environment = make_environment("reach")
    environment.reset(0)
    monkeypatch.setattr(mujoco, "Renderer", broken)
    with pytest.raises(RendererError, match=r"does not start.*EGL device.*MUJOCO_GL=osmesa"):
        environment.render(32)


@pytest.mark.parametrize("camera", ["corner", "corner2", "corner3", "corner4"])
def test_what_rises_goes_up_in_the_image(renderer, camera):
    environment = make_environment("reach")
    environment.reset(0)

    def height(image):
        """The mean row of the finger's blue, which nothing else has."""
        red, green, blue = np.moveaxis(image.astype(int), -1, 0)
        rows, _ = np.nonzero((green > 90) & (blue > 90) & (red < 40))
        assert len(rows)
        return rows.mean()

    low = height(environment.render(160, camera))
    for _ in range(40):
        environment.step([0, 0, 1, 0])
    assert height(environment.render(160, camera)) < low - 3
    environment.close()


def test_images_are_drawn_without_multisampling_and_shadows(renderer):
    import mujoco

    environment = make_environment("reach")
    environment.reset(0)
    drawn = rendering.Renderer(environment._simulator.model, size=48, cameras=("corner2",))
    flags = drawn._renderer.scene.flags
    for flag in ("SHADOW", "REFLECTION", "SKYBOX"):
        assert not flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")]
    assert environment._simulator.model.vis.quality.offsamples == 0
    drawn.close()


def test_a_renderer_that_goes_leaves_the_others_alone(renderer):
    """In both ways: closed, and forgotten after the next one was made."""
    images = Images(48)
    environments = {}
    for task in ("reach", "door-open", "drawer-open"):
        environments[task] = make_environment(task, images=images)
    alone = {task: it.reset(1).images["corner2"] for task, it in environments.items()}
    environments.pop("door-open").close()
    for task, environment in environments.items():
        assert np.array_equal(environment.reset(1).images["corner2"], alone[task]), task
    environment = make_environment("reach", images=images)
    environment.reset(2)
    environment = make_environment("door-open", images=images)
    gc.collect()
    assert np.array_equal(environment.reset(1).images["corner2"], alone["door-open"])


def test_a_renderer_may_be_forgotten_while_another_draws(renderer, monkeypatch):
    environment = make_environment("reach", images=Images(48))
    alone = environment.reset(1).images["corner2"]
    others = [make_environment("reach", images=Images(48))]
    others[0].reset(1)
    drawing = environment._renderer._renderer
    update = drawing.update_scene

    def interrupted(*given):
        drawing._gl_context.make_current()
        others.clear()
        gc.collect()
        update(*given)

    monkeypatch.setattr(drawing, "update_scene", interrupted)
    assert np.array_equal(environment.reset(1).images["corner2"], alone)
    assert len(rendering._forgotten) == 1
    environment.reset(1)
    assert rendering._forgotten == []


def test_an_optimizer_can_be_made_after_drawing(renderer):
    """With PyTorch for CUDA it loads Triton, which does not bear OSMesa before it."""
    script = (
        "from feedforward.robot.tasks import Images, make_environment\n"
        "make_environment('reach', images=Images(16)).reset(1)\n"
        "import torch\n"
        "torch.optim.Adam([torch.zeros(1, requires_grad=True)])\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
