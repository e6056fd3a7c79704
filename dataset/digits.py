"""Handwritten digits, which come with scikit-learn and need no download."""

from common.errors import UserError

import numpy as np

from .image_folder import resize_all
from .splits import Split


def load_digits(image_size: int) -> tuple[tuple[str, ...], Split]:
    """scikit-learn's 1,797 digits (UCI, test part): 8×8 gray pixels from 0 to 16, returned as RGB from 0 to 255."""
    try:
        from sklearn import datasets
    except ImportError:
        raise UserError("--data digits needs scikit-learn: pip install scikit-learn") from None
    digits = datasets.load_digits()
    gray = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return tuple("0123456789"), Split(resize_all(gray, image_size), digits.target.astype(np.int64))
