import numpy as np
import pytest
import torch

from plait.errors import EarthError, InversionError
from plait.magnetotellurics.differentiable import forward_model
from plait.magnetotellurics.earth import Mesh, flat_mesh
from plait.magnetotellurics.elements import Stencil
from plait.magnetotellurics.forward_2d import make_problem
from plait.magnetotellurics.jacobian import Linearization, dense_sensitivity, predict
from plait.magnetotellurics.modem_data import read_modem_data
from plait.magnetotellurics.modem_model import read_modem_model
from plait.magnetotellurics.observations import Component, Observations
from plait.magnetotellurics.receivers import OnNode
from plait.magnetotellurics.survey import MU_0

from .sections import block2_mesh, padded, padding

POSITIONS_M = np.array([-1800.0, -1000.0, 0.0, 350.0, 2100.0])
FREQUENCIES_HZ = np.array([100.0, 1.0, 0.03])


def every_component():
    f, r, c = (
        grid.ravel()
        for grid in np.meshgrid(
            np.arange(len(FREQUENCIES_HZ)),
            np.arange(len(POSITIONS_M)),
            [int(c) for c in Component],
            indexing="ij",
        )
    )
    return Observations(
        frequency_hz=FREQUENCIES_HZ,
        position_m=POSITIONS_M,
        receiver_names=tuple("abcde"),
        frequency_index=f,
        receiver_index=r,
        component=c,
        value=np.zeros(len(f)),
        error=np.ones(len(f)),
    )


def small_mesh(*, terrain):
    mesh = flat_mesh(
        y_m=padded(np.linspace(-3000.0, 3000.0, 13), 3e4, 1.8),
        ground_z_m=np.concatenate([[0.0], padding(60.0, 3e4, 1.5)]),
        air_height_m=5e4,
    )
    if not terrain:
        return mesh
    rows = np.full(len(mesh.y_m) - 1, mesh.num_air)
    rows[4:9] -= 2
    return Mesh(y_m=mesh.y_m, z_m=mesh.z_m, num_air=mesh.num_air - 2, terrain_row=rows)


@pytest.fixture(params=[(Stencil.FITTED, False), (Stencil.PLAIN, False), (Stencil.FITTED, True)],
                ids=["fitted", "plain", "terrain"])  # fmt: skip
def case(request):
    stencil, terrain = request.param
    mesh = small_mesh(terrain=terrain)
    generator = np.random.default_rng(3)
    log10_rho = 2 + 0.5 * generator.standard_normal(mesh.ground_shape)
    observations = every_component()
    positions = observations.position_m + (17.0 if terrain else 0.0)
    problem = make_problem(mesh, position_m=positions, frequency_hz=FREQUENCIES_HZ, stencil=stencil)
    return problem, log10_rho, observations


def test_the_adjoint_is_the_transpose_to_ten_digits(case):
    problem, log10_rho, observations = case
    linearization = Linearization(problem, 10**log10_rho, observations)
    generator = np.random.default_rng(4)
    v = generator.standard_normal(log10_rho.shape)
    u = generator.standard_normal(observations.num_data)
    forward = u @ linearization.times(v)
    backward = np.sum(linearization.transpose_times(u) * v)
    assert forward == pytest.approx(backward, rel=1e-10)


def test_the_explicit_jacobian_equals_its_products(case):
    problem, log10_rho, observations = case
    dense = dense_sensitivity(problem, 10**log10_rho, observations)
    linearization = Linearization(problem, 10**log10_rho, observations)
    v = np.random.default_rng(5).standard_normal(log10_rho.shape)
    u = np.random.default_rng(6).standard_normal(observations.num_data)
    np.testing.assert_allclose(dense.values, linearization.values, rtol=1e-12)
    np.testing.assert_allclose(
        dense.jacobian @ v.ravel(), linearization.times(v), rtol=1e-8, atol=1e-13
    )
    np.testing.assert_allclose(
        (dense.jacobian.T @ u).reshape(v.shape), linearization.transpose_times(u), atol=1e-12
    )


def test_finite_differences_agree_to_five_digits(case):
    problem, log10_rho, observations = case
    linearization = Linearization(problem, 10**log10_rho, observations)
    v = np.random.default_rng(7).standard_normal(log10_rho.shape)
    step = 1e-4
    ahead, behind = (
        predict(problem, 10 ** (log10_rho + sign * step * v), observations) for sign in (1, -1)
    )
    difference = (ahead - behind) / (2 * step)
    for component in Component:
        rows = observations.component == component
        error = np.linalg.norm(difference[rows] - linearization.times(v)[rows])
        assert error < 1e-5 * np.linalg.norm(difference[rows]), component.name


def test_torch_gradients_are_the_adjoint(case):
    problem, log10_rho, observations = case
    tensor = torch.tensor(log10_rho, requires_grad=True)
    predicted = forward_model(tensor, problem=problem, observations=observations)
    weights = torch.linspace(-1, 1, observations.num_data, dtype=torch.float64)
    (weights * predicted).sum().backward()
    linearization = Linearization(problem, 10**log10_rho, observations)
    assert tensor.grad is not None
    np.testing.assert_allclose(
        tensor.grad.numpy(), linearization.transpose_times(weights.numpy()), rtol=1e-10, atol=1e-14
    )


def test_a_second_derivative_is_an_error():
    mesh = small_mesh(terrain=False)
    problem = make_problem(mesh, position_m=POSITIONS_M, frequency_hz=FREQUENCIES_HZ)
    tensor = torch.full(mesh.ground_shape, 2.0, dtype=torch.float64, requires_grad=True)
    predicted = forward_model(
        tensor, problem=problem, observations=every_component(), num_workers=2
    )
    (gradient,) = torch.autograd.grad((predicted**2).sum(), tensor, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_float32_model_is_refused(case):
    problem, log10_rho, observations = case
    with pytest.raises(EarthError, match="float64"):
        forward_model(
            torch.tensor(log10_rho, dtype=torch.float32),
            problem=problem,
            observations=observations,
        )


def test_observations_of_other_frequencies_are_refused(case):
    problem, log10_rho, observations = case
    other = make_problem(problem.mesh, position_m=POSITIONS_M + 20, frequency_hz=np.ones(3))
    with pytest.raises(InversionError, match="other frequencies"):
        predict(other, 10**log10_rho, observations)


CONTACTS_M = (317500.0, 347500.0, 377500.0)


@pytest.fixture(scope="module")
def block2(mt_data):
    folder = mt_data / "modem2d_block2"
    observations = read_modem_data(folder / "d0_JT.dat")
    problem = make_problem(
        block2_mesh(folder),
        position_m=observations.position_m,
        frequency_hz=observations.frequency_hz,
        stencil=Stencil.PLAIN,
        on_node=OnNode.RIGHT,
    )
    section = read_modem_model(folder / "m0.rho").resistivity_ohm_m()
    return folder, observations, Linearization(problem, section, observations)


@pytest.mark.parametrize("first", [Component.TE_REAL, Component.TM_REAL])
def test_j_times_dm_is_that_of_modem(block2, first):
    folder, observations, linearization = block2
    # Their perturbation is of ln rho.
    change = read_modem_model(folder / "dm.rho").value / np.log(10)
    theirs = read_modem_data(folder / "Jxdm_JT.dat").value
    keep = np.isin(observations.component, [first, first + 1])
    # On the contacts J dm differs (21 % in TM at 347.5 km); how ModEM differentiates there is
    # not known to us.
    keep &= ~np.isin(observations.position_m, CONTACTS_M)[observations.receiver_index]
    difference = np.linalg.norm((linearization.times(change) - theirs)[keep])
    assert difference < 0.02 * np.linalg.norm(theirs[keep])


def test_the_transpose_times_d_is_that_of_modem(block2):
    folder, _, linearization = block2
    d = read_modem_data(folder / "d_JT.dat").value
    theirs = read_modem_model(folder / "JTxd_JT.rho").value
    ours = linearization.transpose_times(d) / np.log(10) / MU_0**2  # of V/m/T, by ln rho
    assert np.linalg.norm(ours - theirs) < 0.02 * np.linalg.norm(theirs)
