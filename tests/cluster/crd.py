"""Checking objects against Kubernetes custom-resource definitions, strictly.

Kubernetes drops fields that a definition does not know without a word, so a schema that only says what known fields
look like would let every typing error through. Here an unknown field is an error.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import jsonschema
import yaml


class Definition:
    """A custom-resource definition, in the version that is asked for.

    Args:
        path: Of its YAML.
        version: Such as "v1".
    """

    def __init__(self, path: Path, version: str) -> None:
        spec = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        self.kind: str = spec["names"]["kind"]
        (schema,) = (each["schema"] for each in spec["versions"] if each["name"] == version)
        self._validator = jsonschema.Draft202012Validator(_strict(schema["openAPIV3Schema"]))

    def errors(self, value: dict[str, Any]) -> list[str]:
        """Return what is wrong with an object, each as the place and what the schema says of it."""
        found = self._validator.iter_errors(value)
        return sorted(f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found)


@functools.cache
def definition(path: Path, version: str = "v1") -> Definition:
    """Return a definition; reading one takes half a second."""
    return Definition(path, version)


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    strict = copy.deepcopy(schema)
    # The definitions leave metadata to Kubernetes itself.
    strict["properties"]["metadata"] = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "generateName": {"type": "string", "pattern": "-$"},
            "namespace": {"type": "string"},
        },
    }
    _close(strict)
    return strict


def _close(schema: dict[str, Any]) -> None:
    """Allow no fields but those that are named; and a number or a text where Kubernetes takes both."""
    if schema.get("x-kubernetes-int-or-string"):
        schema["type"] = ["integer", "string"]
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    inner = [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]
    for each in inner:
        if isinstance(each, dict):
            _close(each)
