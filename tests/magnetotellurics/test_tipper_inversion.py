from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from plait.magnetotellurics.earth import flat_mesh
from plait.magnetotellurics.forward_2d import make_problem
from plait.magnetotellurics.inversion import StoppingRule
from plait.magnetotellurics.jacobian import predict
from plait.magnetotellurics.misfit import Misfit
from plait.magnetotellurics.observations import Component, Observations, selected
from plait.magnetotellurics.smooth_inversion import SmoothInversion, invert_smoothly

from .sections import padded, padding, resistivity_of

TIPPER = (Component.TIPPER_REAL, Component.TIPPER_IMAG)
IMPEDANCE = tuple(component for component in Component if component % 4 < 2 and component < 8)


@pytest.fixture(scope="module")
def line():
    """Seven stations over a conductor right of the middle; all data, with 2 % noise."""
    mesh = flat_mesh(
        y_m=padded(np.linspace(-3000.0, 3000.0, 13), 4e4, 1.8),
        ground_z_m=np.concatenate([[0.0], padding(60.0, 4e4, 1.4)]),
        air_height_m=5e4,
    )
    frequency, position = np.array([30.0, 3.0, 0.3]), np.linspace(-2700.0, 2800.0, 7)
    components = [int(component) for component in (*IMPEDANCE, *TIPPER)]
    f, r, c = (g.ravel() for g in np.meshgrid(range(3), range(7), components, indexing="ij"))
    empty = Observations(
        frequency_hz=frequency, position_m=position, receiver_names=tuple("abcdefg"),
        frequency_index=f, receiver_index=r, component=c,
        value=np.zeros(len(f)), error=np.full(len(f), 0.02),
    )  # fmt: skip
    truth = resistivity_of(
        mesh, lambda y, z: np.where((y > 500) & (y < 1500) & (z > 200) & (z < 1500), 5.0, 100.0)
    )
    problem = make_problem(mesh, position_m=position, frequency_hz=frequency)
    noise = 0.02 * np.random.default_rng(5).standard_normal(len(f))
    return problem, replace(empty, value=predict(problem, truth, empty) + noise)


@pytest.mark.parametrize(
    "components", [TIPPER, (*IMPEDANCE, *TIPPER)], ids=["tipper alone", "joint with TE and TM"]
)
def test_the_tipper_is_fitted_and_puts_the_conductor_on_its_side(line, components):
    problem, everything = line
    observations = selected(everything, components)
    stopping = StoppingRule(target_rms=1.05, max_steps=8)
    found = invert_smoothly(problem, observations, settings=SmoothInversion(stopping=stopping))
    assert found.result.rms <= 1.05
    rms = [record.rms for record in found.result.history]
    assert all(later <= earlier for earlier, later in pairwise(rms))
    is_tipper = observations.component >= Component.TIPPER_REAL
    residual = Misfit(observations=observations).residual(found.result.values)
    assert np.sqrt(np.mean(residual[is_tipper] ** 2)) < 1.3
    mesh = problem.mesh
    middle = (mesh.y_m[1:] + mesh.y_m[:-1]) / 2
    depth = mesh.z_m[mesh.num_air + 1 :]
    shallow = found.log10_rho[(depth > 200) & (depth < 1500)].mean(0)
    near = np.abs(middle) < 3000
    assert 500 < middle[near][np.argmin(shallow[near])] < 1500
