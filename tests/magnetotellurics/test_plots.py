import numpy as np
import pytest

from plait.errors import InversionError
from plait.magnetotellurics.earth import flat_mesh
from plait.magnetotellurics.inversion import StepRecord
from plait.magnetotellurics.observations import Component, Observations
from plait.magnetotellurics.plots import (
    convergence_figure,
    fit_figure,
    pseudo_section_figure,
    section_figure,
)


@pytest.fixture
def observations():
    f, r, c = (g.ravel() for g in np.meshgrid(range(4), range(3), [0, 1, 4, 5], indexing="ij"))
    return Observations(
        frequency_hz=np.logspace(1, -2, 4),
        position_m=np.array([0.0, 500.0, 2000.0]),
        receiver_names=("a", "b", "c"),
        frequency_index=f,
        receiver_index=r,
        component=c,
        value=np.random.default_rng(0).uniform(0.5, 1.5, len(f)),
        error=np.full(len(f), 0.05),
    )


def is_a_picture(figure, path):
    figure.savefig(path, dpi=50)
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 2000


def test_a_section_is_drawn(tmp_path):
    mesh = flat_mesh(
        y_m=np.linspace(-3e3, 5e3, 17),
        ground_z_m=np.linspace(0, 4e3, 9),
        air_height_m=1e3,
    )
    figure = section_figure(
        mesh,
        np.full(mesh.ground_shape, 2.0),
        station_m=np.array([0.0, 500.0, 2000.0]),
        max_depth_m=2e3,
    )
    assert is_a_picture(figure, tmp_path / "a.png")
    assert figure.axes[0].get_ylim() == (2.0, 0.0)  # depth points down, in km


def test_pseudo_sections_and_fit_curves_are_drawn(observations, tmp_path):
    figure = pseudo_section_figure(observations, observations.value)
    assert is_a_picture(figure, tmp_path / "a.png")
    figure = fit_figure(observations, observations.value)
    assert is_a_picture(figure, tmp_path / "b.png")
    assert "rms 0.00" in figure.axes[0].get_title()


def test_pseudo_sections_of_impedance_parts_are_refused(observations):
    parts = Observations(**{**vars(observations), "component": np.full(48, int(Component.TE_REAL))})
    with pytest.raises(InversionError, match="as_log_data"):
        pseudo_section_figure(parts, parts.value)


def test_convergence_is_drawn(tmp_path):
    history = [
        StepRecord(step=i, rms=9.0 / (i + 1), roughness=i, trade_off=1, num_forward=i, duration_s=i)
        for i in range(4)
    ]
    assert is_a_picture(convergence_figure(history, target_rms=1.0), tmp_path / "a.png")
