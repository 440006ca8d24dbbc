"""A structured answer about findings: what a decoder may write where JSON is asked for, as a JSON schema.

An answer lists the findings of a report in report.json's own words, without what the report adds by itself (grades,
probabilities, places in the study): `{"findings":[{"code":"nodule","side":"left","size":{"value":12,"unit":"mm"},
"change":"new"}]}`. What the ontology rules out can't be said: no side of a midline finding, no unit but the measure's,
no size that the head could not report, no change of what isn't followed.
"""

import math

from mm import ontology
from mm.report.schema import Json


def findings_schema() -> Json:
    """JSON schema of an answer; every keyword in it is one that a grammar of `mm.decoder` keeps."""
    most = sum(ontology.MAX_INSTANCES if item.focal else 1 for item in ontology.FINDINGS)
    one = {"anyOf": [_finding(item) for item in ontology.FINDINGS]}
    return _object({"findings": {"type": "array", "items": one, "maxItems": most}})


def _finding(item: ontology.Finding) -> Json:
    return _object(
        {
            "code": {"const": item.code},
            # A finding that has gone may have no side left to tell.
            "side": {"enum": list(ontology.SIDES)} if item.sided else {"const": "none"},
            "size": {"type": "null"} if item.measure is None else {"anyOf": [_size(item.measure), {"type": "null"}]},
            "change": {"enum": list(ontology.CHANGES)} if item.followed else {"const": "unknown"},
        }
    )


def _size(measure: ontology.Measure) -> Json:
    """A number as reports print it."""
    value: Json = {"type": "number", "minimum": measure.low, "maximum": measure.high}
    if measure.decimals == 0:
        value = {"type": "integer", "minimum": math.ceil(measure.low), "maximum": math.floor(measure.high)}
    return _object({"value": value, "unit": {"const": measure.unit}})


def _object(properties: Json) -> Json:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
