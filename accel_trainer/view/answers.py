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

CLASS_AXES = (1, -1)  # where the classes are: (batch, classes, ...) as in torch, or (batch, ..., classes)

# What is wrong with the target of a sample, in the column `fault`.
NOT_A_CLASS, NOT_ONE_HOT = 1, 2


@dataclass
class Answers:
    """What is kept of a micro-batch.

    Attributes:
        num_classes: Classes; 0 for a regression.
        columns: Name -> values, each with an entry per sample.
        counts: Of parts of samples, such as pixels: how often each pair (target, prediction) occurs, shape (2,
            classes * classes + 1); the last entry counts what is left out. Scores are read in two ways, as all samples
            together tell which is meant: with the classes on either of `CLASS_AXES`, or a single score as logit and as
            probability. `None` where a sample has one target.
        axes: Those of `CLASS_AXES` that the shapes allow, the likely one first; empty for a single score.
    """

    num_classes: int
    columns: dict[str, Tensor] = field(default_factory=dict)
    counts: Tensor | None = None
    axes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reading:
    """How a loss reads outputs and targets, as far as torch's own losses tell.

    Attributes:
        ignore_index: The class index that is left out.
        scores: What a single score is; `None` where only the outputs can tell.
        class_axis: The axis of the classes; `None` where only the shapes can tell.
        is_log: Whether the outputs of a regression are logarithms of the values.
    """

    ignore_index: int = -100
    scores: Literal["logits", "probabilities"] | None = None
    class_axis: int | None = None
    is_log: bool = False


def answers_of(
    kind: Kind, forward: Forward, num_samples: int, reading: Reading, predicts_next: bool = False
) -> Answers:
    """Reduce outputs and targets of a micro-batch.

    A classification takes scores of shape (batch, classes, ...), or (batch, ..., classes), with class indices of shape
    (batch, ...) or one-hot targets of the same shape; or a single score per target, with targets 0 and 1. With
    `predicts_next` the scores of a token, (batch, tokens, classes), are for the target of the next.
    A regression takes outputs and targets of one shape, (batch,) or (batch, targets).

    Raises:
        ValueError: Outputs or targets are neither.
    """
    outputs = _tensor_of(forward.outputs, "outputs of the model", kind).detach()
    targets = _tensor_of(forward.targets, "targets", kind).detach()
    if not outputs.ndim or not targets.ndim or len(outputs) != num_samples or len(targets) != num_samples:
        raise _mismatch(kind, outputs, targets, f"one entry per sample, of {num_samples}")
    if kind == "regression":
        return _regression(outputs, targets, reading.is_log)
    if not outputs.is_floating_point():
        raise _mismatch(kind, outputs, targets, f"scores of classes, but the outputs are of {outputs.dtype}")
    if predicts_next and outputs.ndim == 3 and targets.ndim == 2:
        outputs, targets = outputs[:, :-1], targets[:, 1:]
    return _classification(outputs, targets, reading)


def reading_of(loss_fn: Any) -> Reading:
    """Return how a loss reads outputs and targets; what it does not tell is as usual."""
    function, keywords = unwrap_partial(loss_fn)

    def setting(name: str, default: Any) -> Any:
        return keywords.get(name, getattr(function, name, default))

    is_by_class = function in (F.cross_entropy, F.nll_loss) or type(function) in (nn.CrossEntropyLoss, nn.NLLLoss)
    is_of_counts = isinstance(function, nn.PoissonNLLLoss) or function is F.poisson_nll_loss
    return Reading(
        ignore_index=int(setting("ignore_index", -100)),
        scores=_scores_of(function),
        class_axis=1 if is_by_class else None,
        is_log=is_of_counts and bool(setting("log_input", True)),
    )


def _scores_of(function: Any) -> Literal["logits", "probabilities"] | None:
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


def _regression(outputs: Tensor, targets: Tensor, is_log: bool) -> Answers:
    predictions, wanted = outputs.reshape(len(outputs), -1), targets.reshape(len(targets), -1)
    shapes = [[size for size in tensor.shape[1:] if size != 1] for tensor in (outputs, targets)]
    if shapes[0] != shapes[1] or outputs.is_complex() or targets.is_complex() or not outputs.is_floating_point():
        raise _mismatch("regression", outputs, targets, "a real number for each target, in one shape")
    if predictions.shape[1] > MOST_TARGETS:
        raise _mismatch("regression", outputs, targets, f"at most {MOST_TARGETS} targets per sample")
    if is_log:
        predictions = (predictions.float() if predictions.element_size() < 4 else predictions).exp()
    return Answers(0, {"target": wanted, "prediction": predictions})


def _classification(outputs: Tensor, targets: Tensor, reading: Reading) -> Answers:
    """Bring scores to shape (batch, parts, classes) and targets to (batch, parts), and reduce them."""
    size = len(outputs)
    fault = torch.zeros(size, dtype=torch.int8, device=outputs.device)
    targets = targets.to(outputs.device)
    targets = targets if targets.is_floating_point() else targets.long()
    has_one = outputs.ndim == 1 or outputs.shape[1] == 1 or outputs.shape == (*targets.shape, 1)
    is_single = has_one and outputs.numel() == targets.numel()
    axes: tuple[int, ...] = ()
    if not is_single:
        if outputs.ndim < 2:
            raise _mismatch("classification", outputs, targets, "scores of shape (batch, classes)")
        if outputs.shape == targets.shape:  # one-hot, or the probability of each class
            fault = _not_one_hot(targets)
            targets, axes = targets.argmax(dim=1), (1,)
        if targets.numel() == size and outputs.ndim == 2:
            targets = targets.reshape(size)
        axes = axes or _class_axes(outputs, targets, reading.class_axis)
    outputs = outputs.float() if outputs.element_size() < 4 else outputs
    num_parts = targets.numel() // size  # 0 of a single token that has no next
    readings = [outputs.movedim(axis, -1) for axis in CLASS_AXES if axis in axes] or [outputs.unsqueeze(-1)]
    scores = [one.reshape(size, num_parts, one.shape[-1]) for one in readings]
    parts = targets.reshape(size, num_parts)
    num_classes = 2 if is_single else scores[0].shape[-1]
    is_left_out = parts == reading.ignore_index
    is_class = is_left_out | ((parts >= 0) & (parts < num_classes) & (parts == parts.round()))
    fault = torch.maximum(fault, NOT_A_CLASS * (~is_class).any(dim=1).to(torch.int8))
    wanted = torch.where(is_class & ~is_left_out, parts, -1).long()
    if outputs.ndim <= 2:
        return Answers(num_classes, {"fault": fault, **_of_samples(scores[0][:, 0], wanted[:, 0])}, axes=axes)
    columns, counts = _of_parts(scores, wanted, num_classes)
    return Answers(num_classes, {"fault": fault, **columns}, counts, axes)


def _class_axes(outputs: Tensor, targets: Tensor, class_axis: int | None) -> tuple[int, ...]:
    """Return those of `CLASS_AXES` that the shapes allow, the likely one first.

    They allow both where there are as many tokens as classes. Then it is the axis that the loss tells; else the likely
    one is the last of (batch, tokens, classes), and axis 1 of (batch, classes, height, width).
    """
    shapes = {1: outputs.shape[:1] + outputs.shape[2:], -1: outputs.shape[:-1]}
    allowed = [axis for axis in CLASS_AXES if targets.shape == shapes[axis]]
    if not allowed:
        needed = "scores (batch, classes, ...) and class indices (batch, ...), or one-hot targets"
        raise _mismatch("classification", outputs, targets, needed)
    if outputs.ndim == 2 or class_axis in allowed:
        return (class_axis or 1,)
    likely = -1 if outputs.ndim == 3 else 1
    return tuple(sorted(allowed, key=lambda axis: axis != likely))


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


def _of_parts(readings: list[Tensor], wanted: Tensor, num_classes: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the columns of samples with many targets each, and how often each pair of classes occurs.

    `readings` are the scores, (batch, parts, classes), or as they are read with the classes on either axis.
    """
    if num_classes > MOST_CLASSES_OF_PARTS:
        raise ValueError(
            f'report="classification" counts parts of samples, such as pixels or tokens, in at most '
            f"{MOST_CLASSES_OF_PARTS:,} classes; got {num_classes:,}. Compute what you need with whole_metrics."
        )
    columns: dict[str, Tensor] = {}
    counted = [(wanted >= 0) & ~scores.isnan().any(dim=-1) for scores in readings]
    if readings[0].shape[-1] == 1:
        scores = readings[0][..., 0]
        columns["low"], columns["high"] = scores.nan_to_num(0.5).aminmax(dim=1)
        predictions, counted = [(scores > 0).long(), (scores > 0.5).long()], counted * 2
    else:
        predictions = [scores.argmax(dim=-1) for scores in readings]
    pairs = list(zip(predictions, counted, strict=True))
    wrong = [((prediction != wanted) & is_counted).sum(dim=1) for prediction, is_counted in pairs]
    none = num_classes**2
    codes = [torch.where(is_counted, wanted * num_classes + prediction, none) for prediction, is_counted in pairs]
    counts = torch.stack([torch.bincount(code.flatten(), minlength=none + 1) for code in codes])
    columns["num_parts"] = torch.stack([is_counted.sum(dim=1) for is_counted in counted], dim=1).expand(-1, 2)
    columns["num_wrong"] = torch.stack(wrong, dim=1).expand(-1, 2)  # one reading stands for both
    return columns, counts.expand(2, -1)
