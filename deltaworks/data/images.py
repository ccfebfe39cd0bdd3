"""Images: checked when they are loaded, turned into pixels when a batch is made."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .bad_rows import Unfit, shown

MEAN, STD = 0.5, 0.5
"""What pixels in [0, 1] are normalised with where the base brings no image processor (ViT's own values)."""


def check_image(value: Any, folder: Path | None) -> dict[str, Any]:
    """An image as it is stored: `{path, bytes, pixels, shape}`, one of the first three set.

    **Arguments:**

    - `value`: a path (relative to `folder`), bytes, `{path, bytes}` as in Hugging Face Parquet files, a PIL image, or
      an array or nested list, height x width (x channels), integers in 0..255 or floats in 0..1.

    **Raises:** `Unfit` when it is no readable image.
    """
    stored: dict[str, Any] = {"path": None, "bytes": None, "pixels": None, "shape": None}
    if isinstance(value, Mapping) and ("path" in value or "bytes" in value):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str | Path):
        path = Path(value) if folder is None else folder / Path(value)
        if not path.is_file():
            raise Unfit(f"image {shown(str(path))}: no such file")
        stored["path"] = str(path)
    elif isinstance(value, bytes):
        stored["bytes"] = value
    elif value is None:
        raise Unfit("image is missing; a path, bytes, a PIL image or an array is needed")
    else:
        pixels = _as_array(value)
        stored["pixels"], stored["shape"] = pixels.ravel().tolist(), list(pixels.shape)
        return stored
    try:
        with _pillow().open(stored["path"] or io.BytesIO(stored["bytes"])) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        raise Unfit(f"image cannot be read ({error})") from None
    return stored


def _as_array(value: Any) -> np.ndarray:
    """Pixels as float32 in [0, 1], height x width x channels."""
    if type(value).__module__.partition(".")[0] == "PIL":
        value = np.asarray(value.convert("RGB" if value.mode not in ("L", "1") else "L"))
    try:
        array = np.asarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)
    except ValueError:
        raise Unfit("image is a ragged list; height x width (x channels) is needed") from None
    if array.dtype.kind not in "iuf":
        raise Unfit(f"image is {shown(value)}; a path, bytes, a PIL image or an array is needed")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise Unfit(f"image is an array of shape {array.shape}; height x width (x 1, 3 or 4 channels) is needed")
    top = 255 if array.dtype.kind in "iu" else 1.0
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > top:
        raise Unfit(
            f"image has pixels in {array.min()}..{array.max()}; integers in 0..255 or floats in 0..1 are needed"
        )
    return (array[:, :, :3] / top).astype(np.float32)


def decode(stored: Mapping[str, Any]) -> Float[np.ndarray, "height width channels"]:
    """The pixels of a stored image, in [0, 1], one or three channels.

    **Raises:** `ValueError` that names the file when it cannot be decoded.
    """
    if stored["pixels"] is not None:
        return np.asarray(stored["pixels"], dtype=np.float32).reshape(stored["shape"])
    try:
        with _pillow().open(stored["path"] or io.BytesIO(stored["bytes"])) as image:
            return _as_array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{stored['path'] or 'image given as bytes'}: cannot be decoded ({error})") from None


def to_pixels(
    image: Float[np.ndarray, "height width channels"], size: tuple[int, int], channels: int
) -> Float[Tensor, "channels size size"]:
    """Resizes (bilinear, antialiased), converts grey to colour or back, and normalises to [-1, 1]."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    if tuple(pixels.shape[1:]) != size:
        pixels = torch.nn.functional.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0]
    if pixels.shape[0] != channels:
        pixels = pixels.mean(dim=0, keepdim=True).expand(channels, -1, -1)
    return (pixels - MEAN) / STD


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ModuleNotFoundError("reading images needs Pillow: pip install 'deltaworks[vision]'") from None
    return Image
