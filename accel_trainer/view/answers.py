"""A model's answers reduced, on the device, to a few numbers per sample, of which an evaluation's report is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..numbers.forward import Forward
from ..numbers.loss_functions import unwrap_partial

Kind = Literal["classification", "regression"]
KINDS: tuple[Kind, ...] = ("classification", "regression")
MOST_CLASSES_OF_PARTS = 1024  # of pixels or tokens: their pairs are counted in a table of classes x classes
MOST_TARGETS = 64  # of a regression, per sample

# What is wrong with the target of a sample, in the column `fault`.
NOT_A_CLASS, NOT_ONE_HOT = 1, 2


@dataclass
class Answers:
    """What is kept of a micro-batch.

    Attributes:
        num_classes: Classes; 0 for a regression.
        columns: Name -> values, each with an entry per sample.
        counts: Of parts of samples, such as pixels: how often each pair (target, prediction) occurs, shape (readings,
            classes * classes + 1); the last entry counts what is left out. Binary scores are read in two ways, as
            logits and as probabilities. `None` where a sample has one target.
    """

    num_classes: int
    columns: dict[str, Tensor] = field(default_factory=dict)
    counts: Tensor | None = None


def answers_of(kind: Kind, forward: Forward, num_samples: int, ignore_index: int = -100) -> Answers:
    """Reduce outputs and targets of a micro-batch.

    A classification takes scores of shape (batch, classes, ...), or (batch, ..., classes), with class indices of shape
    (batch, ...) or one-hot targets of the same shape; or a single score per target, with targets 0 and 1. Targets of
    `ignore_index` are left out. A regression takes outputs and targets of one shape, (batch,) or (batch, targets).

    Raises:
        ValueError: Outputs or targets are neither.
    """
    outputs = _tensor_of(forward.outputs, "outputs of the model", kind).detach()
    targets = _tensor_of(forward.targets, "targets", kind).detach()
    if not outputs.ndim or not targets.ndim or len(outputs) != num_samples or len(targets) != num_samples:
        raise _mismatch(kind, outputs, targets, f"one entry per sample, of {num_samples}")
    if kind == "regression":
        return _regression(outputs, targets)
    if not outputs.is_floating_point():
        raise _mismatch(kind, outputs, targets, f"scores of classes, but the outputs are of {outputs.dtype}")
    return _classification(outputs, targets, ignore_index)


def ignore_index_of(loss_fn: Any) -> int:
    """Return the class index that a loss leaves out: its own, or the one that is usual."""
    function, keywords = unwrap_partial(loss_fn)
    return int(keywords.get("ignore_index", getattr(function, "ignore_index", -100)))


def reading_of(loss_fn: Any) -> Literal["logits", "probabilities"] | None:
    """Return how one of torch's own losses reads the outputs; `None` where only the outputs can tell."""
    function, _ = unwrap_partial(loss_fn)
    if isinstance(function, nn.BCELoss) or function is F.binary_cross_entropy:
        return "probabilities"
    of_logits: tuple[Any, ...] = (F.binary_cross_entropy_with_logits, F.cross_entropy, F.nll_loss)
    is_of_logits = isinstance(function, (nn.BCEWithLogitsLoss, nn.CrossEntropyLoss, nn.NLLLoss))
    return "logits" if is_of_logits or function in of_logits else None


def _tensor_of(given: Any, what: str, kind: Kind) -> Tensor:
    """Return the tensor that is meant: the only one, or the `logits` of a dictionary."""
    if isinstance(given, Tensor):
        return given
    if given is None:
        raise ValueError(
            f'report="{kind}" needs the {what}, which compute_loss keeps to itself. Use loss_fn(outputs, targets), or '
            "let compute_loss return outputs and targets too."
        )
    if isinstance(given, Mapping) and isinstance(given.get("logits"), Tensor):
        return given["logits"]  # type: ignore[no-any-return]
    parts = list(given.values()) if isinstance(given, Mapping) else given if isinstance(given, (list, tuple)) else []
    tensors = [part for part in parts if isinstance(part, Tensor) and part.ndim]
    if len(tensors) == 1:
        return tensors[0]
    held = f"the keys {list(given)}" if isinstance(given, Mapping) else f"a {type(given).__name__}"
    raise ValueError(
        f'report="{kind}" needs one tensor of {what}, or a dictionary with "logits"; got {held} with {len(tensors)} '
        "tensors. Let the model return the one that is meant."
    )


def _mismatch(kind: Kind, outputs: Tensor, targets: Tensor, needed: str) -> ValueError:
    other = "regression" if kind == "classification" else "classification"
    shapes = f"{tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}"
    return ValueError(
        f'report="{kind}" needs {needed}; got outputs of shape {shapes}. Is it report="{other}"? For anything else, '
        "compute what you need with whole_metrics, or from predict."
    )


def _regression(outputs: Tensor, targets: Tensor) -> Answers:
    predictions, wanted = outputs.reshape(len(outputs), -1), targets.reshape(len(targets), -1)
    shapes = [[size for size in tensor.shape[1:] if size != 1] for tensor in (outputs, targets)]
    if shapes[0] != shapes[1] or outputs.is_complex() or targets.is_complex() or not outputs.is_floating_point():
        raise _mismatch("regression", outputs, targets, "a real number for each target, in one shape")
    if predictions.shape[1] > MOST_TARGETS:
        raise _mismatch("regression", outputs, targets, f"at most {MOST_TARGETS} targets per sample")
    return Answers(0, {"target": wanted, "prediction": predictions})


def _classification(outputs: Tensor, targets: Tensor, ignore_index: int) -> Answers:
    """Bring scores to shape (batch, parts, classes) and targets to (batch, parts), and reduce them."""
    size = len(outputs)
    fault = torch.zeros(size, dtype=torch.int8, device=outputs.device)
    targets = targets.to(outputs.device)
    targets = targets if targets.is_floating_point() else targets.long()
    is_single = outputs.numel() == targets.numel() and (outputs.ndim == 1 or outputs.shape[1] == 1)
    if is_single:
        scores, parts = outputs.reshape(size, -1, 1), targets.reshape(size, -1)
    else:
        if outputs.ndim < 2:
            raise _mismatch("classification", outputs, targets, "scores of shape (batch, classes)")
        if outputs.shape == targets.shape:  # one-hot, or the probability of each class
            fault = _not_one_hot(targets)
            targets = targets.argmax(dim=1)
        if targets.numel() == size and outputs.ndim == 2:
            targets = targets.reshape(size)
        if targets.shape == outputs.shape[:1] + outputs.shape[2:]:
            scores = outputs.movedim(1, -1)
        elif targets.shape == outputs.shape[:-1]:
            scores = outputs
        else:
            needed = "scores (batch, classes, ...) and class indices (batch, ...), or one-hot targets"
            raise _mismatch("classification", outputs, targets, needed)
        scores, parts = scores.reshape(size, -1, scores.shape[-1]), targets.reshape(size, -1)
    scores = scores.float() if scores.element_size() < 4 else scores
    num_classes = 2 if is_single else scores.shape[-1]
    is_left_out = parts == ignore_index
    is_class = is_left_out | ((parts >= 0) & (parts < num_classes) & (parts == parts.round()))
    fault = torch.maximum(fault, NOT_A_CLASS * (~is_class).any(dim=1).to(torch.int8))
    wanted = torch.where(is_class & ~is_left_out, parts, -1).long()
    if parts.shape[1] == 1:
        return Answers(num_classes, {"fault": fault, **_of_samples(scores[:, 0], wanted[:, 0])})
    columns, counts = _of_parts(scores, wanted, num_classes)
    return Answers(num_classes, {"fault": fault, **columns}, counts)


def _not_one_hot(targets: Tensor) -> Tensor:
    sums = targets.sum(dim=1).reshape(len(targets), -1)
    is_wrong = ((sums - 1).abs() > 1e-3).any(dim=1) | (targets < 0).reshape(len(targets), -1).any(dim=1)
    return NOT_ONE_HOT * is_wrong.to(torch.int8)


def _of_samples(scores: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Return the columns of samples with one target each; a target of -1 is left out."""
    if scores.shape[-1] == 1:
        return {"target": wanted, "score": scores[:, 0]}
    best, prediction = scores.max(dim=-1)
    sums = scores.sum(dim=-1)
    return {
        "target": wanted,
        "prediction": prediction,
        "score": best,
        "target_score": scores.gather(1, wanted.clamp_min(0)[:, None])[:, 0],
        "normaliser": scores.logsumexp(dim=-1),
        "is_distribution": (scores >= 0).all(dim=-1) & ((sums - 1).abs() < 1e-2),
    }


def _of_parts(scores: Tensor, wanted: Tensor, num_classes: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the columns of samples with many targets each, and how often each pair of classes occurs."""
    if num_classes > MOST_CLASSES_OF_PARTS:
        raise ValueError(
            f'report="classification" counts parts of samples, such as pixels or tokens, in at most '
            f"{MOST_CLASSES_OF_PARTS:,} classes; got {num_classes:,}. Compute what you need with whole_metrics."
        )
    is_counted = (wanted >= 0) & ~scores.isnan().any(dim=-1)
    columns = {"num_parts": is_counted.sum(dim=1)}
    if scores.shape[-1] == 1:
        scores = scores[..., 0]
        columns["low"], columns["high"] = scores.nan_to_num(0.5).aminmax(dim=1)
        readings = [(scores > 0).long(), (scores > 0.5).long()]
    else:
        readings = [scores.argmax(dim=-1)]
    wrong = [((reading != wanted) & is_counted).sum(dim=1) for reading in readings]
    none = num_classes**2
    codes = [torch.where(is_counted, wanted * num_classes + reading, none) for reading in readings]
    counts = torch.stack([torch.bincount(code.flatten(), minlength=none + 1) for code in codes])
    return columns | {"num_wrong": torch.stack(wrong, dim=1)}, counts
