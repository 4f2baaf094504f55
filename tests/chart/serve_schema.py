"""What Ray Serve says of applications that KubeRay would hand to it: a list of configs in, what is wrong with each out.

Run as a program of its own, so that nothing of Ray, its warnings and its threads, comes into the process of the tests.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def judge(config: dict[str, Any]) -> list[str]:
    """Nothing when it is taken as it is."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        return [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    return unknown_keys(ServeDeploySchema, config)


def unknown_keys(model: Any, config: dict[str, Any], path: str = "") -> list[str]:
    """Serve lets every key pass: those that none of its models has, `args` left out, which are ours."""
    found = []
    for key, value in config.items():
        if key not in model.model_fields:
            found.append(path + key)
            continue
        inner = model_in(model.model_fields[key].annotation)
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            if inner is not None and isinstance(item, dict):
                below = f"{path}{key}.{index}." if isinstance(value, list) else f"{path}{key}."
                found += unknown_keys(inner, item, below)
    return found


def model_in(annotation: Any) -> Any:
    """The pydantic model in it, or None: X, list[X], X | None."""
    if hasattr(annotation, "model_fields"):
        return annotation
    inner = (model_in(item) for item in getattr(annotation, "__args__", ()))
    return next((model for model in inner if model is not None), None)


if __name__ == "__main__":
    json.dump([judge(config) for config in json.load(sys.stdin)], sys.stdout)
