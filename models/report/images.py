"""Images as data URIs, which stand in the page itself."""

from __future__ import annotations

import base64

import cv2
import numpy as np
from numpy.typing import NDArray

from models.visualize import Image

_WIDTH = 320  # pixels; larger images are made smaller


def data_uri(image: Image, *, photo: bool) -> str:
    """An image in the page itself: JPEG of photographs, PNG of all else."""
    if image.shape[1] > _WIDTH:
        size = (_WIDTH, max(1, round(image.shape[0] * _WIDTH / image.shape[1])))
        image = np.asarray(
            cv2.resize(image, size, interpolation=cv2.INTER_AREA if photo else cv2.INTER_NEAREST), np.uint8
        )
    suffix, kind, options = (".jpg", "jpeg", [cv2.IMWRITE_JPEG_QUALITY, 85]) if photo else (".png", "png", [])
    return uri(kind, cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1])


def uri(kind: str, encoded: NDArray[np.uint8] | bytes) -> str:
    """A file's bytes as a data URI of that kind of image."""
    return f"data:image/{kind};base64,{base64.b64encode(bytes(encoded)).decode()}"
