"""Bodies on their way in: read strictly, handed on as trees, and shown in OpenAPI as the types they must fit.

A handler says ``data: VmsBody``; it gets the JSON tree, because the service checks trees (all problems at once, and it
must know what was given from what is a default). OpenAPI shows the shape. Structs of ours are described here too:
Litestar's own plugin stumbles over defaults that are structs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec
from litestar import Request
from litestar.plugins import OpenAPISchemaPlugin
from litestar.types import Empty
from litestar.typing import FieldDefinition

from corral.api.bodies import Change, CreateFlavor, CreateImage, CreateTemplate, CreateVms, Fork, Power
from corral.model import strict
from corral.model.schema import sentences

if TYPE_CHECKING:
    from litestar._openapi.schema_generation import SchemaCreator


class StrictRequest(Request[Any, Any, Any]):
    """A request whose JSON is read by :func:`corral.model.strict.loads`."""

    __slots__ = ()

    async def json(self) -> Any:
        return strict.loads(await self.body() or b"null")


class Body:
    """A body as it came: ``tree``. ``shape`` is the type that OpenAPI shows."""

    shape: ClassVar[type[msgspec.Struct]]

    def __init__(self, tree: Any) -> None:
        self.tree = tree


class VmsBody(Body):
    shape = CreateVms


class ImageBody(Body):
    shape = CreateImage


class FlavorBody(Body):
    shape = CreateFlavor


class TemplateBody(Body):
    shape = CreateTemplate


class ForkBody(Body):
    shape = Fork


class PowerBody(Body):
    shape = Power


class ChangeBody(Body):
    shape = Change


BODIES: dict[str, type[Body]] = {"vm": VmsBody, "image": ImageBody, "flavor": FlavorBody, "template": TemplateBody}
"""Body of a POST, by kind."""


def is_body(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Body)


def read_body(kind: type[Body], tree: Any) -> Body:
    """Litestar's decoder for :class:`Body` types."""
    return kind(tree)


class Shapes(OpenAPISchemaPlugin):
    """How bodies and structs look in OpenAPI."""

    def is_plugin_supported_field(self, field_definition: FieldDefinition) -> bool:
        kind = field_definition.annotation
        return (
            not field_definition.is_union
            and isinstance(kind, type)
            and (is_body(kind) or issubclass(kind, msgspec.Struct))
        )

    def to_openapi_schema(self, field_definition: FieldDefinition, schema_creator: SchemaCreator) -> Any:
        kind = field_definition.annotation
        if is_body(kind):
            return schema_creator.for_field_definition(FieldDefinition.from_annotation(kind.shape))
        info = msgspec.inspect.type_info(kind)
        assert isinstance(info, msgspec.inspect.StructType)
        hints = field_definition.get_type_hints(include_extras=True, resolve_generics=True)
        properties = {f.encode_name: self._property(hints[f.name], f) for f in info.fields}
        required = [f.encode_name for f in info.fields if f.required]
        if info.tag_field:
            properties[info.tag_field] = FieldDefinition.from_annotation(Literal[info.tag])
            required.append(info.tag_field)
        schema_creator.create_component_schema(field_definition, required=sorted(required), property_fields=properties)
        registry = schema_creator.schema_registry
        schema = registry.get_schema_for_field_definition(field_definition)
        schema.additional_properties = False if info.forbid_unknown_fields else None
        schema.description = (kind.__doc__ or "").strip() or None
        about = sentences(kind)
        for name, inner in (schema.properties or {}).items():
            if name in about and hasattr(inner, "description"):
                inner.description = about[name]
        return registry.get_reference_for_field_definition(field_definition) or schema

    def _property(self, hint: Any, field: msgspec.inspect.Field) -> FieldDefinition:
        plain = isinstance(field.default, (str, int, float, bool)) or field.default is None
        default = field.default if plain and field.default is not msgspec.NODEFAULT else Empty
        return FieldDefinition.from_annotation(annotation=hint, name=field.encode_name, default=default)
