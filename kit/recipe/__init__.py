"""The recipe: YAML files, checked against pydantic models."""
