"""Names for the arrays of this package."""

from typing import Any

import numpy as np
import numpy.typing as npt

RealArray = npt.NDArray[np.float64]
ComplexArray = npt.NDArray[np.complex128]
IndexArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
AnyArray = npt.NDArray[Any]
