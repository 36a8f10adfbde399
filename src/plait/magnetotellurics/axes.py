"""From channels as they lay in the field to one pair of orthogonal axes."""

import numpy as np


def to_common_axes(
    transfer: np.ndarray,
    *,
    output_azimuth_deg: tuple[float, ...],
    input_azimuth_deg: tuple[float, float],
) -> np.ndarray:
    """Express a transfer function in orthogonal axes whose x lies along the first input channel.

    With H_measured = U_h H and E_measured = U_e E, where each row of U is (cos, sin) of a channel's
    azimuth from x, Z = U_e^-1 Z_measured U_h; a scalar output (Hz) has T = T_measured U_h.

    Args:
        transfer: (..., n_out, 2) complex or real, n_out 1 (Hz) or 2 (electric).
        output_azimuth_deg: azimuths of the outputs; ignored for one output.
        input_azimuth_deg: azimuths of the two magnetic channels.

    Returns:
        (..., n_out, 2); the x azimuth is input_azimuth_deg[0].
    """
    x = input_azimuth_deg[0]
    turned = transfer @ _directions(np.array(input_azimuth_deg) - x)
    if transfer.shape[-2] == 1:
        return turned
    return np.linalg.inv(_directions(np.array(output_azimuth_deg) - x)) @ turned


def _directions(azimuth_deg: np.ndarray) -> np.ndarray:
    angle = np.radians(azimuth_deg)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)
