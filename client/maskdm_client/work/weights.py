"""Weights that come down with a plan: the whole model, or only what training changes where the rest is here already.

A federation that trains biases, or adapters, never changes the other weights. They come once and stay in the site's
folder until another federation needs the room.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from maskdm.errors import plain
from maskdm.federated.encoding import as_tensor
from maskdm.federated.plan import RoundPlan, work_key
from maskdm.networks.trainable import expected_shapes
from maskdm.run.runfolder import atomic_write
from maskdm.run.tensorfile import Arrays, Document, Stored, bytes_of, chunks, layout_of, unpack

from ..refusals import PlanRefused, RestMissing


def key_of(document: str, packed: Document) -> str:
    """The same work, asked for again under another number, has the same key; "" where it is no work that can be done.

    Whether the weights came whole or in part makes no difference.
    """
    try:
        plan, arrays = RoundPlan.model_validate_json(document), unpack(packed)
    except ValueError:
        return ""
    names: Iterable[str] = plan.changed() if plan.action == "train" else sorted(arrays)
    return work_key(plan, (bytes_of(arrays[name]) for name in names if name in arrays))


def read_weights(packed: Document, plan: RoundPlan, folder: Path | None) -> tuple[dict[str, Tensor], Arrays]:
    """All weights, fp32 and only to be read, since they lie in what came, and the arrays as they came.

    Args:
        folder: where weights that never change are kept; None keeps none and completes none.

    Raises:
        PlanRefused: what came does not fit the model of the plan.
        RestMissing: it has to come whole.
    """
    try:
        came = unpack(packed)
    except ValueError as error:
        raise PlanRefused(f"the coordinator's weights were refused: {plain(str(error))}") from error
    expected, changed = expected_shapes(plan.model.model), set(plan.changed())
    arrays = came
    if plan.action == "train" and came.keys() == changed != expected.keys():
        arrays = {**came, **_rest(plan, folder)}
    if _shapes(arrays) != expected or any(array.dtype != "float32" for array in arrays.values()):
        raise PlanRefused("the coordinator's weights do not fit the model that the plan describes")
    weights = {name: as_tensor(array) for name, array in arrays.items()}
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise PlanRefused("the coordinator's weights are not finite")
    if folder and plan.action == "train" and arrays is came and changed != expected.keys():
        _keep({name: array for name, array in came.items() if name not in changed}, plan, folder)
    return weights, came


def _keep(rest: Arrays, plan: RoundPlan, folder: Path) -> None:
    atomic_write(_path(plan, folder), chunks(layout_of(rest), rest.__getitem__))


def _rest(plan: RoundPlan, folder: Path | None) -> Arrays:
    try:
        return Stored(_path(plan, folder)) if folder else {}
    except (OSError, ValueError) as error:
        raise RestMissing("only the weights that change came, and the others are not here; asking for them") from error


def _path(plan: RoundPlan, folder: Path) -> Path:
    return folder / f"rest-{plan.federation}-{plan.train}.safetensors"


def _shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}
