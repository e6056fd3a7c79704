"""Handwritten digits that need no download: scikit-learn carries them."""

from common.errors import UserError

import numpy as np
from PIL import Image

from .image_folder import room_for, to_array
from .splits import Split


def load_digits(image_size: int) -> tuple[tuple[str, ...], Split]:
    """scikit-learn's 1,797 handwritten digits (UCI, test part): 8×8 pixels of 0 … 16, here grey RGB of 0 … 255."""
    try:
        from sklearn import datasets
    except ImportError:
        raise UserError("--data digits needs scikit-learn: pip install scikit-learn") from None
    digits = datasets.load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = room_for(len(grey), image_size)
    for row, image in enumerate(grey):
        images[row] = to_array(Image.fromarray(image), image_size)
    return tuple(str(digit) for digit in range(10)), Split(images, digits.target.astype(np.int64))
