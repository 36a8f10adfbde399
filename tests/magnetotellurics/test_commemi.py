"""COMMEMI's 2-D models by the public interface [Zhdanov et al. 1997, J. Appl. Geophys. 37, 133].

2D-1 against its published table, 2D-0 in TM against its exact series, the others against
themselves on meshes of half the cell sizes and, far from the middle, against layered sides.
"""

import numpy as np
import pytest

from plait.magnetotellurics.earth import flat_mesh
from plait.magnetotellurics.forward_1d import layered_impedance
from plait.magnetotellurics.forward_2d import Mode, make_problem, respond
from plait.magnetotellurics.mesh_design import MeshDesign, mesh_from_skin_depths
from plait.magnetotellurics.survey import MU_0

from .sections import padded, padding, resistivity_of

# y (m), TE and TM apparent resistivity (ohm m) of COMMEMI 2D-1 at 0.1 s, and the gates in percent:
# Weaver's results ("3 Canada").
COMMEMI_2D1 = np.array(
    [
        (0.0, 8.07, 9.86, 1.5, 2.5),
        (500.0, 14.10, 46.40, 1.5, 3.0),
        (1000.0, 51.50, 94.80, 4.0, 2.5),
        (2000.0, 95.71, 98.30, 1.5, 2.5),
        (4000.0, 104.00, 99.70, 1.5, 2.5),
        (8000.0, 100.00, 100.00, 1.5, 2.5),
        (16000.0, 100.00, 100.00, 1.5, 2.5),
    ]
)
CONVERGED_TM_AT_THE_EDGE = 44.86  # see the test of refinements
FREQUENCY_HZ = np.array([10.0])


def section_2d1(y, z):
    return np.where((abs(y) < 500) & (z > 250) & (z < 2250), 0.5, 100.0)


def even_mesh_2d1(column_m, row_m, *, reach_m=6e4):
    """Even columns and rows over the block, which they fit."""
    half = round(5000 / column_m) * column_m
    y = padded(np.arange(-half, half + column_m / 2, column_m), reach_m)
    core = np.arange(0, 2750.1, row_m)
    z = np.concatenate([core, core[-1] + padding(row_m, reach_m)])
    return flat_mesh(y_m=y, ground_z_m=z, air_height_m=1e5)


def designed_mesh_2d1():
    return mesh_from_skin_depths(
        COMMEMI_2D1[:, 0],
        frequency_hz=FREQUENCY_HZ,
        min_resistivity_ohm_m=0.5,
        max_resistivity_ohm_m=100.0,
        design=MeshDesign(),
        contact_y_m=(-500.0, 500.0),
        interface_z_m=(250.0, 2250.0),
    )


def apparent_resistivities(mesh, section, *, position_m, frequency_hz=FREQUENCY_HZ, modes=Mode):
    """Give TE and TM, (n_rx,), at one frequency."""
    problem = make_problem(mesh, position_m=position_m, frequency_hz=frequency_hz)
    responses = respond(problem, resistivity_of(mesh, section), modes=tuple(modes))
    return [
        np.abs(z[0]) ** 2 / (2 * np.pi * frequency_hz[0] * MU_0)
        for z in (responses.te_impedance_ohm, responses.tm_impedance_ohm)
    ]


@pytest.mark.parametrize("columns_to_the_edge", [7, 10], ids=["71 m", "50 m"])
def test_2d1_gives_the_published_table_on_meshes_of_its_kind(columns_to_the_edge):
    """Even columns of 70 to 85 m give the whole TM column of the table to 1 %."""
    mesh = even_mesh_2d1(500 / columns_to_the_edge, 25.0)
    te, tm = apparent_resistivities(mesh, section_2d1, position_m=COMMEMI_2D1[:, 0])
    assert (100 * np.abs(te / COMMEMI_2D1[:, 1] - 1) < COMMEMI_2D1[:, 3]).all(), te
    assert (100 * np.abs(tm / COMMEMI_2D1[:, 2] - 1) < COMMEMI_2D1[:, 4]).all(), tm
    if columns_to_the_edge == 7:
        assert (100 * np.abs(tm / COMMEMI_2D1[:, 2] - 1) < 1.0).all(), tm


def test_2d1_converges_at_the_edge_below_the_published_tm_value():
    """Each halving of cells moves the value half as far: corners make it first order."""
    edge = np.array([500.0])
    values = [
        apparent_resistivities(
            even_mesh_2d1(size, size, reach_m=2e4), section_2d1, position_m=edge, modes=[Mode.TM]
        )[1][0]
        for size in (50.0, 25.0, 12.5)
    ]
    steps = np.diff(values)
    ratio = steps[1] / steps[0]
    assert 0.25 < ratio < 0.55, values
    limit = values[-1] + steps[1] * ratio / (1 - ratio)
    assert limit == pytest.approx(CONVERGED_TM_AT_THE_EDGE, rel=3e-3)


def test_2d1_on_a_designed_mesh_gives_the_table_and_the_converged_value_at_the_edge():
    te, tm = apparent_resistivities(designed_mesh_2d1(), section_2d1, position_m=COMMEMI_2D1[:, 0])
    assert (100 * np.abs(te / COMMEMI_2D1[:, 1] - 1) < COMMEMI_2D1[:, 3]).all(), te
    away = COMMEMI_2D1[:, 0] != 500
    assert (100 * np.abs(tm / COMMEMI_2D1[:, 2] - 1) < COMMEMI_2D1[:, 4])[away].all(), tm
    # The table's 46.40 is that of coarse columns; this mesh is fine there.
    assert tm[~away] == pytest.approx(CONVERGED_TM_AT_THE_EDGE, rel=3e-3)


DEPTH_2D0_M, HALF_2D0_M, RHO_2D0 = 50e3, 10e3, (10.0, 1.0, 2.0)


def exact_tm_2d0(y, frequency_hz, *, num_terms=20000):
    """Zyx of three segments over a perfect conductor, exactly [after Weaver et al. 1985].

    With Hx = 1 on top and no flux at the depth d, every segment shares the eigenfunctions
    sin(q_n z), q_n = (n + 1/2) pi / d, so that their amplitudes h_n(y) are matched one by one:
    h_n'' = g^2 (h_n - a), g^2 = q^2 + i w mu_0 / rho; a = (2 / d) q / g^2 is the layer's own.
    """
    induction = 2j * np.pi * frequency_hz * MU_0
    q = (np.arange(num_terms) + 0.5) * np.pi / DEPTH_2D0_M
    g = [np.sqrt(q**2 + induction / rho) for rho in RHO_2D0]
    a = [2 / DEPTH_2D0_M * q / root**2 for root in g]
    # Unknowns: the decay into the left, e^{-g s} from both ends of the middle, the right.
    decay = np.exp(-g[1] * 2 * HALF_2D0_M)
    one, zero = np.ones_like(decay), np.zeros_like(decay)
    flux = [rho * root for rho, root in zip(RHO_2D0, g, strict=True)]
    rows = [
        [one, -one, -decay, zero],
        [flux[0], flux[1], -flux[1] * decay, zero],
        [zero, decay, one, -one],
        [zero, -flux[1] * decay, flux[1], flux[2]],
    ]
    sides = np.stack([a[1] - a[0], zero, a[2] - a[1], zero], axis=-1)
    matrix = np.array(rows).transpose(2, 0, 1)
    left, from_left, from_right, right = np.linalg.solve(matrix, sides[..., None])[..., 0].T
    found = []
    for place in y:
        if place < -HALF_2D0_M:
            segment, part = 0, left * np.exp(g[0] * (place + HALF_2D0_M))
        elif place > HALF_2D0_M:
            segment, part = 2, right * np.exp(-g[2] * (place - HALF_2D0_M))
        else:
            segment = 1
            part = from_left * np.exp(-g[1] * (place + HALF_2D0_M))
            part = part + from_right * np.exp(-g[1] * (HALF_2D0_M - place))
        k = np.sqrt(induction / RHO_2D0[segment])
        layer = -k * np.tanh(k * DEPTH_2D0_M)
        found.append(RHO_2D0[segment] * (layer + np.sum(q * part)))
    return np.array(found)


def test_2d0_in_tm_equals_its_exact_series():
    y = np.array([-40e3, -20e3, -12e3, -8e3, -3e3, 0.0, 6e3, 9e3, 12e3, 20e3, 45e3])
    frequency = np.array([1 / 300])
    mesh = mesh_from_skin_depths(
        y,
        frequency_hz=frequency,
        min_resistivity_ohm_m=1.0,
        max_resistivity_ohm_m=10.0,
        design=MeshDesign(cells_per_skin_depth=30.0),
        contact_y_m=(-HALF_2D0_M, HALF_2D0_M),
        interface_z_m=(DEPTH_2D0_M,),
    )

    def section(y, z):
        top = np.select([y < -HALF_2D0_M, y < HALF_2D0_M], RHO_2D0[:2], RHO_2D0[2])
        return np.where(z < DEPTH_2D0_M, top, 1e-9)

    problem = make_problem(mesh, position_m=y, frequency_hz=frequency)
    found = respond(problem, resistivity_of(mesh, section), modes=[Mode.TM]).tm_impedance_ohm[0]
    ratio = found / exact_tm_2d0(y, frequency[0])
    assert (np.abs(np.abs(ratio) ** 2 - 1) < 0.01).all(), ratio
    assert (np.degrees(np.abs(np.angle(ratio))) < 0.3).all(), ratio


def section_2d2(y, z):
    is_block = (z > 7e3) & (z < 9e3) & (((y > -22e3) & (y < -4e3)) | ((y > 10e3) & (y < 22e3)))
    return np.where(is_block, 0.1, np.where(z < 75e3, 100.0, 10.0))


def section_2d3(y, z):
    top = np.select([y < -20e3, y < 0, y < 20e3], [10.0, 1.0, 100.0], 1000.0)
    return np.where(z < 10e3, top, np.where(z < 30e3, 100.0, 0.1))


def section_2d4(y, z):
    """A basin of 2.5 ohm m with sloping sides; the slopes become stairs of cells."""
    floor = np.interp(y, [-6e3, -6e3 + 1e-6, 2e3, 4e3, 5e3], [2e3, 4e3, 4e3, 2e3, 1e3])
    fill = np.where(y < -6e3, 10.0, 2.5)
    below = np.where(z < 25e3, 1000.0, 5.0)
    return np.select([z < 500, z < floor], [25.0, fill], below)


MODELS = {
    "2D-2": (section_2d2, 0.01, (0.1, 100.0), (-22e3, -4e3, 10e3, 22e3), (7e3, 9e3, 75e3)),
    "2D-3": (section_2d3, 0.01, (1.0, 1000.0), (-20e3, 0.0, 20e3), (10e3, 30e3)),
    "2D-4": (section_2d4, 0.1, (2.5, 1000.0), (-6e3, 2e3, 5e3), (500.0, 1e3, 2e3, 4e3, 25e3)),
}
STATIONS_M = np.array([-35e3, -24e3, -12e3, -3e3, 1.3e3, 7e3, 16e3, 28e3])
GATES = {"2D-2": (0.015, 0.5), "2D-3": (0.015, 0.4), "2D-4": (0.03, 0.7)}


@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_hardly_changes_on_a_mesh_of_half_the_cell_sizes(name):
    section, frequency_hz, (low, high), contacts, interfaces = MODELS[name]
    frequency = np.array([frequency_hz])
    answers = []
    for cells, growth in ((10.0, 1.12), (20.0, 1.06)):
        mesh = mesh_from_skin_depths(
            STATIONS_M,
            frequency_hz=frequency,
            min_resistivity_ohm_m=low,
            max_resistivity_ohm_m=high,
            design=MeshDesign(cells_per_skin_depth=cells, growth=growth),
            contact_y_m=contacts,
            interface_z_m=interfaces,
        )
        problem = make_problem(mesh, position_m=STATIONS_M, frequency_hz=frequency)
        answers.append(respond(problem, resistivity_of(mesh, section)))
    coarse, fine = answers
    most_rho, most_degrees = GATES[name]
    for field in ("te_impedance_ohm", "tm_impedance_ohm"):
        ratio = getattr(coarse, field) / getattr(fine, field)
        assert np.abs(np.abs(ratio) ** 2 - 1).max() < most_rho, (field, ratio)
        assert np.degrees(np.abs(np.angle(ratio))).max() < most_degrees, (field, ratio)


def test_far_from_the_middle_of_2d4_each_side_has_its_own_layers():
    sides = np.array([-1.9e6, 1.9e6])
    frequency = np.array([0.1])
    mesh = mesh_from_skin_depths(
        np.array([-2e6, *np.linspace(-10e3, 10e3, 5), 2e6]),
        frequency_hz=frequency,
        min_resistivity_ohm_m=2.5,
        max_resistivity_ohm_m=1000.0,
        design=MeshDesign(),
        contact_y_m=MODELS["2D-4"][3],
        interface_z_m=MODELS["2D-4"][4],
    )
    problem = make_problem(mesh, position_m=sides, frequency_hz=frequency)
    found = respond(problem, resistivity_of(mesh, section_2d4))
    layers = (
        ([25.0, 10.0, 1000.0, 5.0], [500.0, 1500.0, 23e3]),
        ([25.0, 2.5, 1000.0, 5.0], [500.0, 500.0, 24e3]),
    )
    for side, (rho, thickness) in enumerate(layers):
        exact = layered_impedance(
            frequency, resistivity_ohm_m=np.array(rho), thickness_m=np.array(thickness)
        )
        for z in (found.te_impedance_ohm[0, side], -found.tm_impedance_ohm[0, side]):
            assert abs(z / exact[0] - 1) < 1e-3


def test_contacts_and_interfaces_are_nodes():
    mesh = designed_mesh_2d1()
    assert {-500.0, 500.0} <= set(mesh.y_m)
    assert {0.0, 250.0, 2250.0} <= set(mesh.z_m)
