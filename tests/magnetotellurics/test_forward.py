import numpy as np
import pytest

from plait.errors import EarthError
from plait.magnetotellurics.earth import Mesh, flat_mesh
from plait.magnetotellurics.elements import Stencil
from plait.magnetotellurics.forward_1d import layered_impedance, skin_depth_m
from plait.magnetotellurics.forward_2d import Mode, make_problem, respond, solve_mode
from plait.magnetotellurics.mesh_design import MeshDesign, mesh_from_skin_depths
from plait.magnetotellurics.modem_data import read_modem_data
from plait.magnetotellurics.modem_model import read_modem_model
from plait.magnetotellurics.observations import Component
from plait.magnetotellurics.receivers import OnNode
from plait.magnetotellurics.survey import MU_0

from .sections import block2_mesh, impedance_grid, padded, padding, resistivity_of

LAYERS_OHM_M = np.array([30.0, 300.0, 3.0, 1000.0, 10.0])
LAYERS_M = np.array([40.0, 800.0, 3000.0, 60000.0])
EIGHT_DECADES_HZ = np.logspace(4, -4, 17)


def test_a_half_space_has_45_degrees_and_its_resistivity():
    z = layered_impedance(
        np.array([1e-3, 1.0, 1e3]),
        resistivity_ohm_m=np.array([50.0]),
        thickness_m=np.array([]),
    )
    np.testing.assert_allclose(np.degrees(np.angle(z)), 45.0)
    np.testing.assert_allclose(np.abs(z) ** 2 / (2 * np.pi * MU_0), 50 * np.array([1e-3, 1, 1e3]))


def test_layers_of_one_resistivity_are_a_half_space():
    arguments = {"resistivity_ohm_m": np.full(4, 7.0), "thickness_m": np.array([3.0, 50.0, 1e3])}
    one = {"resistivity_ohm_m": np.array([7.0]), "thickness_m": np.array([])}
    np.testing.assert_allclose(
        layered_impedance(EIGHT_DECADES_HZ, **arguments), layered_impedance(EIGHT_DECADES_HZ, **one)
    )


def test_the_skin_depth_is_503_metres_at_one_ohm_m_and_one_hertz():
    assert skin_depth_m(1.0, 1.0) == pytest.approx(503.29, abs=0.01)


def layered_section(mesh):
    depth = np.cumsum(LAYERS_M)
    return resistivity_of(mesh, lambda _, z: LAYERS_OHM_M[np.searchsorted(depth, z)])


def layered_mesh():
    z = np.concatenate([[0.0], padding(4.0, 2e6, 1.15)])
    for depth in np.cumsum(LAYERS_M):
        z[np.argmin(np.abs(z - depth))] = depth
    y = padded(np.linspace(-2000.0, 2000.0, 5), 1e6, 1.6)
    return flat_mesh(y_m=y, ground_z_m=z, air_height_m=1e6)


@pytest.mark.parametrize("mode", list(Mode))
def test_a_layered_section_equals_the_exact_recursion_over_eight_decades(mode):
    """The gate is 0.3 % and 0.2 degrees; fitted rows are exact but for round-off."""
    mesh = layered_mesh()
    problem = make_problem(
        mesh, position_m=np.array([-1300.0, 0.0, 950.0]), frequency_hz=EIGHT_DECADES_HZ
    )
    responses = respond(problem, layered_section(mesh), modes=[mode])
    found = responses.te_impedance_ohm if mode is Mode.TE else -responses.tm_impedance_ohm
    exact = layered_impedance(
        EIGHT_DECADES_HZ, resistivity_ohm_m=LAYERS_OHM_M, thickness_m=LAYERS_M
    )
    ratio = found / exact[:, None]
    assert np.abs(np.abs(ratio) ** 2 - 1).max() < 1e-5
    assert np.degrees(np.abs(np.angle(ratio))).max() < 1e-3


def test_plain_rows_are_of_second_order():
    frequency = np.array([1.0])
    exact = layered_impedance(
        frequency, resistivity_ohm_m=np.array([100.0]), thickness_m=np.array([])
    )
    errors = []
    for num in (100, 200, 400):
        z = np.concatenate([np.linspace(0, 50000.0, num + 1), [60000.0, 1e5]])
        mesh = flat_mesh(y_m=np.linspace(-4, 4, 9) * 1e4, ground_z_m=z, air_height_m=1e5)
        problem = make_problem(
            mesh, position_m=np.zeros(1), frequency_hz=frequency, stencil=Stencil.PLAIN
        )
        responses = respond(problem, np.full(mesh.ground_shape, 100.0))
        errors.append(abs(responses.te_impedance_ohm[0, 0] / exact[0] - 1))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def mesh_over_a_block():
    y = padded(np.arange(-5000, 5001, 50.0), 6e4)
    core = np.concatenate([np.arange(0, 2250, 25.0), np.arange(2250, 3251, 50.0)])
    z = np.concatenate([core, core[-1] + padding(50.0, 6e4)])
    return flat_mesh(y_m=y, ground_z_m=z, air_height_m=1e5)


def test_a_symmetric_section_has_a_symmetric_response_and_an_odd_tipper():
    mesh = mesh_over_a_block()
    block = resistivity_of(
        mesh, lambda y, z: np.where((abs(y) < 500) & (z > 250) & (z < 2250), 0.5, 100.0)
    )
    problem = make_problem(
        mesh, position_m=np.array([-1525.0, -700.0, 700.0, 1525.0]), frequency_hz=np.array([10.0])
    )
    responses = respond(problem, block)
    for field in (responses.te_impedance_ohm, responses.tm_impedance_ohm):
        np.testing.assert_allclose(field[0, :2], field[0, :1:-1], rtol=1e-8)
    np.testing.assert_allclose(responses.tipper[0, :2], -responses.tipper[0, :1:-1], rtol=1e-7)
    assert np.abs(responses.tipper).min() > 0.05


def test_different_left_and_right_sections_each_give_their_own_layers_far_away():
    y = padded(np.concatenate([np.linspace(-3e4, 3e4, 61)]), 4e5)
    z = np.concatenate([[0.0], padding(20.0, 4e5, 1.2)])
    mesh = flat_mesh(y_m=y, ground_z_m=z, air_height_m=4e5)
    section = resistivity_of(mesh, lambda y, _: np.where(y < 0, 10.0, 300.0))
    frequency = np.array([10.0, 0.1])
    problem = make_problem(mesh, position_m=np.array([-2.5e5, 3.5e5]), frequency_hz=frequency)
    responses = respond(problem, section)
    for found in (responses.te_impedance_ohm, responses.tm_impedance_ohm):
        rho = np.abs(found) ** 2 / (2 * np.pi * frequency[:, None] * MU_0)
        np.testing.assert_allclose(rho, [[10.0, 300.0]] * 2, rtol=0.01)
        phase = np.degrees(np.angle(found)) % 180
        np.testing.assert_allclose(phase, 45.0, atol=0.3)


@pytest.mark.parametrize(
    ("component", "gate_percent"), [(Component.TE_REAL, 0.5), (Component.TM_REAL, 0.1)]
)
def test_block2_gives_modem_responses_on_the_same_mesh(mt_data, component, gate_percent):
    """With plain rows, which are ModEM's scheme; the gates are medians of apparent resistivity."""
    folder = mt_data / "modem2d_block2"
    data = read_modem_data(folder / "d0_JT.dat")
    problem = make_problem(
        block2_mesh(folder),
        position_m=data.position_m,
        frequency_hz=data.frequency_hz,
        stencil=Stencil.PLAIN,
        on_node=OnNode.RIGHT,
    )
    responses = respond(problem, read_modem_model(folder / "m0.rho").resistivity_ohm_m())
    is_te = component is Component.TE_REAL
    found = responses.te_impedance_ohm if is_te else responses.tm_impedance_ohm
    ratio = found / impedance_grid(data, component)
    assert 100 * np.median(np.abs(np.abs(ratio) ** 2 - 1)) < gate_percent
    assert 100 * np.abs(np.abs(ratio) - 1).max() < 4  # contacts included
    assert np.degrees(np.median(np.abs(np.angle(ratio)))) < 0.06


def test_ground_under_a_raised_terrain_row_is_the_same_flat_ground():
    flat = flat_mesh(
        y_m=padded(np.linspace(-2000.0, 2000.0, 21), 5e4),
        ground_z_m=np.concatenate([[0.0], padding(25.0, 5e4, 1.2)]),
        air_height_m=5e4,
    )
    sunk = Mesh(
        y_m=flat.y_m,
        z_m=flat.z_m,
        num_air=flat.num_air - 2,
        terrain_row=np.full(len(flat.y_m) - 1, flat.num_air),
    )
    section = resistivity_of(flat, lambda y, _: np.where(y < 100, 10.0, 300.0))
    padded_section = np.concatenate([np.ones((2, section.shape[1])), section])
    arguments = {"position_m": np.array([-730.0, 420.0]), "frequency_hz": np.array([3.0])}
    one = respond(make_problem(flat, **arguments), section)
    two = respond(make_problem(sunk, **arguments), padded_section)
    np.testing.assert_allclose(one.te_impedance_ohm, two.te_impedance_ohm, rtol=1e-9)
    np.testing.assert_allclose(one.tm_impedance_ohm, two.tm_impedance_ohm, rtol=1e-6)


def test_threads_do_not_change_a_bit():
    mesh = layered_mesh()
    problem = make_problem(mesh, position_m=np.zeros(1), frequency_hz=np.array([1.0, 10.0]))
    section = layered_section(mesh)
    one, two = (respond(problem, section, num_workers=n) for n in (1, 2))
    assert (one.te_impedance_ohm == two.te_impedance_ohm).all()
    assert (one.tm_impedance_ohm == two.tm_impedance_ohm).all()


def test_a_mesh_from_skin_depths_reaches_far_and_resolves_the_top():
    mesh = mesh_from_skin_depths(
        np.array([0.0, 1000.0, 3000.0]),
        frequency_hz=np.array([1e-2, 1e2]),
        min_resistivity_ohm_m=10.0,
        max_resistivity_ohm_m=1000.0,
        design=MeshDesign(),
    )
    assert mesh.ground_thickness_m[0] < skin_depth_m(10.0, 1e2) / 9
    assert mesh.z_m[-1] == pytest.approx(4 * skin_depth_m(1000.0, 1e-2))
    assert min(-mesh.y_m[0], mesh.y_m[-1] - 3000) >= 4 * skin_depth_m(1000.0, 1e-2) - 1
    for sizes in (mesh.width_m, mesh.ground_thickness_m):
        growth = sizes[1:] / sizes[:-1]
        assert growth.max() < 1.5
        assert (1 / growth).max() < 1.5


@pytest.mark.parametrize("where", [-1e9, 1e9])
def test_a_receiver_outside_the_mesh_is_refused(where):
    with pytest.raises(EarthError, match="outside the mesh"):
        make_problem(layered_mesh(), position_m=np.array([where]), frequency_hz=np.ones(1))


def test_a_resistivity_that_is_not_positive_is_refused():
    mesh = layered_mesh()
    problem = make_problem(mesh, position_m=np.zeros(1), frequency_hz=np.ones(1))
    with pytest.raises(EarthError, match="positive"):
        solve_mode(problem, np.zeros(mesh.ground_shape), frequency_hz=np.ones(1), mode=Mode.TM)
