"""Which names a client may call the model by."""

from __future__ import annotations

from core.errors import InvalidRequest, ModelNotFound
from router.limits import ServedModel


def check_model(name: str, model: ServedModel) -> None:
    """Raises ModelNotFound, InvalidRequest."""
    if not name:
        raise InvalidRequest("model: must name a model; GET /v1/models lists them", param="model")
    if name not in model.names:
        raise ModelNotFound("model: no such model; GET /v1/models lists what is served", param="model")
