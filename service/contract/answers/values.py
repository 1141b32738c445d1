"""What all answers share: the base of their models, and the types of the values in them.

An answer is read by older and newer versions than wrote it. So fields that a reader does not know are passed
over, an optional field that is missing is None, and a name that is not among the known ones is a text.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from halfstep.service.contract import precision

T = TypeVar("T")


class Answer(BaseModel):
    """The base of the answers' models: frozen, every field present in what is written."""

    # Required even where it may be null: every answer has every field.
    model_config = ConfigDict(
        frozen=True, ser_json_inf_nan="strings", json_schema_serialization_defaults_required=True
    )

    @classmethod
    def of(cls, document: Any) -> Self:
        """The answer that a server sent; what this version does not know of is kept for `document`.

        Raises:
            ValidationError: it is not such an answer.
        """
        return cls.model_validate(document, extra="allow")

    def document(self) -> dict[str, Any]:
        """The answer as plain values, no more and no less than was put into it: what a server sent."""
        known = {name: value for name, value in self.members().items() if name in self._named()}
        return {**{name: _plain(value) for name, value in known.items()}, **(self.model_extra or {})}

    def _named(self) -> set[str]:
        fields = type(self).model_fields
        return {fields[name].alias or name for name in self.model_fields_set if name in fields}

    def members(self) -> dict[str, Any]:
        """The fields by their names on the wire, in order; their values as they are."""
        fields = type(self).model_fields
        return {fields[name].alias or name: value for name, value in self.__dict__.items()}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The schema, without the None that stands for a field missing from an older server's answer."""
        schema = handler(core_schema)
        for field in handler.resolve_ref_schema(schema).get("properties", {}).values():
            if "default" in field and field["default"] is None:
                del field["default"]
            if any("$ref" in kind for kind in (field, *field.get("anyOf", ()))):
                field.pop("title", None)  # what is referred to has its own
        return schema


def with_example(example: Any) -> ConfigDict:
    """The configuration of a model that has this example in the OpenAPI document."""
    return ConfigDict(json_schema_extra={"examples": [example]})


def _plain(value: Any) -> Any:
    if isinstance(value, Answer):
        return value.document()
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return rfc3339(value) if isinstance(value, datetime) else value


class _KnownNames:
    """Describes a union by its first member alone: the names that this version writes."""

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        known: JsonSchemaValue = handler(core_schema)["anyOf"][0]
        return known


Open = Annotated[T | str, Field(union_mode="left_to_right"), _KnownNames()]
"""A name of an enumeration or of a Literal; one that only a newer version knows is a text."""


def _moment(value: Any) -> Any:
    # The store keeps seconds since the epoch.
    return datetime.fromtimestamp(value, UTC) if isinstance(value, float) else value


def rfc3339(moment: datetime) -> str:
    """The time as it stands on the wire."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


Timestamp = Annotated[
    datetime,
    BeforeValidator(_moment),
    PlainSerializer(rfc3339, return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
"""A time, made of seconds since the epoch or of RFC 3339; on the wire in UTC with microseconds."""

Number = Annotated[
    int | float,
    WithJsonSchema(
        {
            "anyOf": [{"type": "number"}, {"type": "string", "enum": ["NaN", "Infinity", "-Infinity"]}],
            "description": "A number; what is not finite is spelled out.",
        }
    ),
]
"""A number; on the wire, where JSON has no NaN and no infinities, those are spelled out."""

Cell = Annotated[
    int | float | bool | str | None,
    WithJsonSchema(
        {"anyOf": [{"type": "number"}, {"type": "boolean"}, {"type": "string"}, {"type": "null"}]}
    ),
]
"""A value of a column of the step record, as it is on the wire: what is not finite is a text."""

JobId = Annotated[str, Field(json_schema_extra={"format": "uuid"}, description="UUIDv7.")]
ComputeDtype = Open[precision.ComputeDtype]
Share = Annotated[float, Field(ge=0, le=1)]
