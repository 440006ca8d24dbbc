"""Which JSON schemas a grammar can promise to keep: xgrammar passes over many a keyword in silence."""

from collections.abc import Mapping
from typing import Final

from mm.decoder.told import short

DEEPEST: Final = 64
NOTES: Final = frozenset({"$schema", "$comment", "title", "description", "default", "examples"})
_RANGE: Final = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_TYPES: Final[dict[str, frozenset[str]]] = {
    "null": frozenset(),
    "boolean": frozenset(),
    "integer": _RANGE,
    "number": _RANGE,
    "string": frozenset({"minLength", "maxLength"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "object": frozenset({"properties", "required", "additionalProperties"}),
}
_KINDS: Final = ("const", "enum", "anyOf", "$ref", "type")


def check_schema(schema: object) -> None:
    """Takes only what was seen to be kept, each keyword beside those that don't undo it.

    A schema is one of `const`, `enum`, `anyOf`, `$ref` and `type` (one name); a type has the keywords of `_TYPES`, an
    object only properties that it names. `$ref` is "#" or "#/$defs/NAME", NAME a plain word; `$defs` stands at the top.

    Raises:
        ValueError: Something else is asked for; the message says where.
    """
    defined = schema.get("$defs", {}) if isinstance(schema, Mapping) else {}
    if not isinstance(defined, Mapping):
        raise ValueError(f"schema: $defs must be an object, got {defined!r}")
    if isinstance(schema, Mapping):
        schema = {name: value for name, value in schema.items() if name != "$defs"}
    refs = frozenset({"#", *(f"#/$defs/{name}" for name in defined if str(name).isidentifier())})
    _check(schema, "#", refs, 0)
    for name, part in defined.items():
        _check(part, f"#/$defs/{name}", refs, 0)


def _check(schema: object, where: str, refs: frozenset[str], depth: int) -> None:
    if depth > DEEPEST:
        raise ValueError(f"schema must be at most {DEEPEST} deep, got more at {where[:80]}...")
    kinds = [kind for kind in _KINDS if kind in schema] if isinstance(schema, Mapping) else []
    if not isinstance(schema, Mapping) or len(kinds) != 1:
        raise ValueError(f"schema at {where} must be an object with one of {', '.join(_KINDS)}, got {short(schema)}")
    value, known = schema[kinds[0]], frozenset[str]()
    if kinds[0] == "type":
        if not isinstance(value, str) or value not in _TYPES:
            raise ValueError(f"type at {where} must be one of {', '.join(_TYPES)}, got {short(value)}")
        known = _TYPES[value]
    elif kinds[0] == "$ref" and not (isinstance(value, str) and value in refs):
        raise ValueError(f"$ref at {where} must be one of {', '.join(sorted(refs))}, got {short(value)}")
    wrong = sorted(map(str, schema.keys() - known - NOTES - {kinds[0]}))
    if wrong:
        raise ValueError(f"schema at {where} can't be kept: {wrong[0]} beside {kinds[0]} {short(value)}")
    if schema.get("additionalProperties", False) is not False:
        raise ValueError(f"additionalProperties at {where} must be false, got {schema['additionalProperties']!r}")
    for name, part in _parts(schema, where).items():
        _check(part, name, refs, depth + 1)


def _parts(schema: Mapping[str, object], where: str) -> dict[str, object]:
    """The schemas in a schema, by where they stand."""
    found: dict[str, object] = {}
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping):
        raise ValueError(f"properties at {where} must be an object, got {short(properties)}")
    if not isinstance(required, list) or any(name not in list(properties) for name in required):
        raise ValueError(f"required at {where} must be a list of names among properties, got {short(required)}")
    found |= {f"{where}/properties/{name}": part for name, part in properties.items()}
    for name in ("anyOf", "prefixItems"):
        if name in schema:
            parts = schema[name]
            if not isinstance(parts, list) or not parts:
                raise ValueError(f"{name} at {where} must be a list of at least one, got {short(parts)}")
            found |= {f"{where}/{name}/{index}": part for index, part in enumerate(parts)}
    if "items" in schema and not ("prefixItems" in schema and schema["items"] is False):
        found[f"{where}/items"] = schema["items"]
    return found
