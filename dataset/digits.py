"""Handwritten digits that need no download: they come with scikit-learn."""

from common.errors import UserError

import numpy as np

from .image_folder import resize_all
from .splits import Split


def load_digits(image_size: int) -> tuple[tuple[str, ...], Split]:
    """scikit-learn's 1,797 handwritten digits (UCI, test part): 8×8 pixels of 0 … 16, here grey RGB of 0 … 255."""
    try:
        from sklearn import datasets
    except ImportError:
        raise UserError("--data digits needs scikit-learn: pip install scikit-learn") from None
    digits = datasets.load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return tuple("0123456789"), Split(resize_all(grey, image_size), digits.target.astype(np.int64))
