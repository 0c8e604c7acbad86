"""Images of an answer as data URIs, which JSON can hold."""

from __future__ import annotations

import io

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from models.report.images import uri
from models.visualize import Image

# Viridis (van der Walt and Smith), [256, 3] red first: its lightness grows with the value, for every eye.
CONFIDENCE = np.asarray(
    cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_VIRIDIS)[:, 0, ::-1], np.uint8
)
# Okabe and Ito's colors, which every eye tells apart.
BRANCHES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
_QUALITY = 90


def photo(image: Image) -> str:
    """An image as JPEG."""
    options = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    return uri("jpeg", cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1])


def indexed(values: NDArray[np.uint8], colors: NDArray[np.uint8]) -> str:
    """A map ``[H, W]`` as PNG with a palette: viewers see ``colors``, programs read the values.

    The map is a file of the classes and their picture at once.
    """
    image = Pillow.fromarray(values)
    image.putpalette(colors.flatten().tolist())
    file = io.BytesIO()
    image.save(file, "PNG")
    return uri("png", file.getvalue())
