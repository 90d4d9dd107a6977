"""Samples of a data set as people see them: their picture or text, and the names of their classes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy
from torch import Tensor
from torch.utils.data import Subset

_TEXT_LENGTH = 300  # characters that are shown
_SIDE = 96  # pixels of a picture, at most
_LEAST_SIDE = 8  # smaller arrays are no pictures
_NAMES = ("labels", "label", "targets", "target", "ner_tags", "class")


def whole(dataset: Any) -> Any:
    """Return the data set that subsets are of."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def index_in_whole(dataset: Any, index: Any) -> Any:
    """Return the index, in the whole data set, of a sample of a subset."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    return int(index) if isinstance(index, (int, numpy.integer, Tensor)) else index


def describe_dataset(dataset: Any) -> str:
    """Return what a data set is, in words: `a Subset of TensorDataset`."""
    name = type(whole(dataset)).__name__
    return f"Subset of {name}" if isinstance(dataset, Subset) else name


def class_names(dataset: Any, num_classes: int) -> list[str]:
    """Return the names of the classes as the data set has them, else their numbers.

    They are the names of a `datasets.ClassLabel` among its features, or its `classes`, as in torchvision.
    """
    dataset = whole(dataset)
    names: Any = None
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        labelled = {
            key: one.names  # type: ignore[union-attr]
            for key, feature in features.items()
            for one in (feature, getattr(feature, "feature", None))
            if getattr(one, "names", None)
        }
        names = next((labelled[key] for key in _NAMES if key in labelled), None)
        names = next(iter(labelled.values())) if names is None and len(labelled) == 1 else names
    names = getattr(dataset, "classes", None) if names is None else names
    if isinstance(names, (list, tuple)) and len(names) == num_classes:
        return [str(name) for name in names]
    return [str(number) for number in range(num_classes)]


def shown_sample(dataset: Any, index: Any) -> tuple[str | None, str | None]:
    """Read a sample again, and return its picture, as a data URI, and its text; `None` where it has none.

    A table of the `datasets` library is read without its transform and format, with all columns.
    """
    dataset, index = whole(dataset), index_in_whole(dataset, index)
    if hasattr(dataset, "with_format") and hasattr(dataset, "column_names"):
        dataset = dataset.with_format(None)
    sample = dataset[index]
    parts = list(sample.values()) if isinstance(sample, Mapping) else sample
    parts = list(parts) if isinstance(parts, (list, tuple)) else [parts]
    pictures = (picture_of(part) for part in parts)
    texts = (part[:_TEXT_LENGTH] + "..." * (len(part) > _TEXT_LENGTH) for part in parts if isinstance(part, str))
    return next(filter(None, pictures), None), next(texts, None)


def picture_of(part: Any) -> str | None:
    """Return a part of a sample as a small PNG in a data URI, `None` if it is no image.

    Images are those of Pillow, and arrays of shape (height, width), (channels, height, width) or (height, width,
    channels) with 1, 3 or 4 channels. Values that are neither bytes nor from 0 to 1 are stretched to what can be seen.
    """
    from PIL import Image

    if not isinstance(part, Image.Image):
        pixels = _pixels_of(part)
        if pixels is None:
            return None
        part = Image.fromarray(pixels)
    picture = part.convert("RGB")
    picture.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _pixels_of(part: Any) -> Any:
    """Return an array of bytes, of shape (height, width) or (height, width, channels); `None` for what is no image."""
    if isinstance(part, Tensor):
        part = part.detach().cpu()
        part = (part.float() if part.is_floating_point() else part).numpy()
    if not isinstance(part, numpy.ndarray) or part.ndim not in (2, 3) or part.dtype.kind not in "uifb":
        return None
    if part.ndim == 3 and part.shape[0] in (1, 3, 4):
        part = numpy.moveaxis(part, 0, -1)
    if part.ndim == 3 and part.shape[-1] not in (1, 3, 4):
        return None
    if min(part.shape[:2]) < _LEAST_SIDE or max(part.shape[:2]) > 16 * min(part.shape[:2]):
        return None
    if part.dtype != numpy.uint8:
        values = numpy.nan_to_num(part.astype("float64"))
        low, high = values.min(), values.max()
        low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, max(high, low + 1e-12))
        part = ((values - low) / (high - low) * 255).round().astype("uint8")
    return part[..., 0] if part.ndim == 3 and part.shape[-1] == 1 else part
