"""What every section of a recipe is made of."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of every section: immutable, strict about types, and closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def written(self) -> set[str]:
        """The keys that the recipe gives a value; `null` gives none, and so drops what `extends` inherits."""
        return {name for name in self.model_fields_set if getattr(self, name) is not None}


def list_or_mapping(value: Any) -> str:
    """Tell a list from a mapping, for pydantic to choose between their models."""
    return "list" if isinstance(value, (list, tuple)) else "mapping"


def text_or_mapping(value: Any) -> str:
    """Tell text from a mapping, for pydantic to choose between their models."""
    return "mapping" if isinstance(value, (dict, BaseModel)) else "text"


def sequence(item: Any) -> Any:
    """Return the type of a tuple of `item`, which may be written as a list."""
    # Strict mode would refuse the lists that YAML produces where a tuple keeps the model immutable.
    return Annotated[tuple[item, ...], Field(strict=False)]


def _at_least_one(items: tuple) -> tuple:
    if not items:
        raise ValueError("at least one entry is needed")
    return items


def non_empty(item: Any) -> Any:
    """Return the type of a tuple of at least one `item`, which may be written as a list."""
    # A validator, not `min_length`: pydantic would count only the valid items, and call a list with one bad item short.
    return Annotated[
        tuple[item, ...], Field(strict=False, json_schema_extra={"minItems": 1}), AfterValidator(_at_least_one)
    ]
