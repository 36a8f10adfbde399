import numpy as np
import pytest

from plait.errors import SurveyError
from plait.magnetotellurics.modem_data import read_modem_data, write_modem_data
from plait.magnetotellurics.modem_model import read_modem_model, write_modem_model
from plait.magnetotellurics.mt2d_data import read_mt2d_data
from plait.magnetotellurics.observations import (
    Component,
    as_log_data,
    selected,
    with_error_floor,
)
from plait.magnetotellurics.occam2d_data import read_occam2d_data, write_occam2d_data
from plait.magnetotellurics.occam2d_model import (
    read_occam2d_iteration,
    read_occam2d_mesh,
    read_occam2d_model,
    write_occam2d_iteration,
)

COLUMNS = ("frequency_hz", "position_m", "frequency_index", "receiver_index", "component")


def assert_same(one, two):
    for name in COLUMNS:
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-8)
    np.testing.assert_allclose(one.value, two.value, rtol=1e-8)
    np.testing.assert_allclose(one.error, two.error, rtol=1e-8)
    assert one.receiver_names == two.receiver_names


def test_modem_data_come_in_ohm_and_the_first_quadrant(mt_data):
    data = read_modem_data(mt_data / "modem2d_block2" / "d0_JT.dat")
    assert data.num_data == 12 * 40 * 2 * 2
    assert data.value[0] == pytest.approx(2.877713e4 * 4e-7 * np.pi)
    assert data.value[1] == pytest.approx(2.847907e4 * 4e-7 * np.pi)
    log = as_log_data(data)
    phase = log.value[np.isin(log.component, [Component.TE_PHASE, Component.TM_PHASE])]
    assert ((phase > 0) & (phase < np.pi / 2)).all()


def test_every_modem_file_is_read(mt_data):
    folder = mt_data / "modem2d_block2"
    for path in sorted(folder.glob("*.dat")):
        assert read_modem_data(path).num_data > 0
    for path in sorted(folder.glob("*.rho")):
        assert read_modem_model(path).value.shape == (31, 100)


def test_modem_data_are_written_and_read_back(mt_data, tmp_path):
    data = read_modem_data(mt_data / "modem2d_block2" / "de_JT.dat")
    write_modem_data(tmp_path / "a.dat", data, title="round trip")
    back = read_modem_data(tmp_path / "a.dat")
    write_modem_data(tmp_path / "b.dat", back, title="round trip")
    assert_same(back, read_modem_data(tmp_path / "b.dat"))
    np.testing.assert_allclose(np.sort(back.value), np.sort(data.value), rtol=1e-8)


def test_a_modem_model_is_written_and_read_back(mt_data, tmp_path):
    model = read_modem_model(mt_data / "modem2d_block2" / "m0.rho")
    assert set(np.round(model.resistivity_ohm_m().ravel(), 2)) == {10.0, 100.0, 1000.0}
    write_modem_model(tmp_path / "a.rho", model)
    back = read_modem_model(tmp_path / "a.rho")
    np.testing.assert_allclose(back.value, model.value, rtol=1e-9)
    np.testing.assert_allclose(back.width_m, model.width_m)


def test_coprod2_is_read_and_its_absent_rows_are_counted(mt_data):
    data = read_mt2d_data(mt_data / "coprod2" / "coprod2data.dat")
    assert data.num_data == 940
    assert data.notes == ("10 of 480 impedances are absent",)
    assert data.value[:2] == pytest.approx([4.301004e-04, 3.124862e-04])


def test_occam_data_are_written_and_read_back(mt_data, tmp_path):
    data = read_occam2d_data(mt_data / "paralana_pb" / "occam2d" / "OccamDataFile.dat")
    assert data.num_data == 1140
    assert [int((data.component == c).sum()) for c in (0, 1, 4, 5)] == [285] * 4
    write_occam2d_data(tmp_path / "a.dat", data, title="round trip")
    back = read_occam2d_data(tmp_path / "a.dat")
    np.testing.assert_allclose(back.value, data.value, rtol=1e-8)
    np.testing.assert_allclose(back.position_m, data.position_m)
    assert len(selected(data, [Component.TE_PHASE]).value) == 285


def test_occam_mesh_model_and_iteration_fit_together(mt_data, tmp_path):
    folder = mt_data / "paralana_pb" / "occam2d"
    mesh = read_occam2d_mesh(folder / "Occam2DMesh")
    model = read_occam2d_model(folder / "Occam2DModel")
    assert model.brick.shape == (len(mesh.thickness_m), len(mesh.width_m)) == (60, 82)
    assert model.num_bricks == 1378
    iteration = read_occam2d_iteration(folder / "ITER12.iter")
    assert len(iteration.log10_rho) == 1378
    write_occam2d_iteration(tmp_path / "a.iter", iteration)
    back = read_occam2d_iteration(tmp_path / "a.iter")
    np.testing.assert_allclose(back.log10_rho, iteration.log10_rho, rtol=1e-8)
    assert back.header["MISFIT VALUE"] == "0.9999997"


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        (read_modem_data, "modem2d_block2/d0_JT.dat"),
        (read_modem_model, "modem2d_block2/m0.rho"),
        (read_mt2d_data, "coprod2/coprod2data.dat"),
        (read_occam2d_data, "paralana_pb/occam2d/OccamDataFile.dat"),
        (read_occam2d_mesh, "paralana_pb/occam2d/Occam2DMesh"),
        (read_occam2d_model, "paralana_pb/occam2d/Occam2DModel"),
        (read_occam2d_iteration, "paralana_pb/occam2d/ITER12.iter"),
    ],
)
def test_a_cut_file_gives_an_error_with_its_line(mt_data, tmp_path, reader, name):
    data = (mt_data / name).read_bytes()
    path = tmp_path / "cut.txt"
    if name.endswith("d0_JT.dat"):
        data = data[: data.index(b"# Synthetic", 10)]  # one mode alone is a whole file
    for part in np.linspace(0.01, 0.997, 25):
        path.write_bytes(data[: int(len(data) * part)])
        with pytest.raises(SurveyError, match=r"cut\.txt:\d+: "):
            reader(path)


def test_an_error_floor_raises_small_errors_only(mt_data):
    log = as_log_data(read_modem_data(mt_data / "modem2d_block2" / "de_JT.dat"))
    floored = with_error_floor(log, log10_rho=0.05, phase_rad=0.01)
    assert floored.error[log.component == Component.TE_LOG10_RHO].min() >= 0.05
    assert (floored.error >= log.error).all()


def test_occam_refuses_real_and_imaginary_parts(mt_data, tmp_path):
    data = read_modem_data(mt_data / "modem2d_block2" / "de_JT.dat")
    with pytest.raises(SurveyError, match="as_log_data"):
        write_occam2d_data(tmp_path / "a.dat", data, title="x")
