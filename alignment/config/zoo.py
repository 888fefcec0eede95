"""Several methods of fine-tuning, each one supervised run."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, ValidationError, model_validator

from alignment.config.sft import SftRunConfig


class PeftZooConfig(SftRunConfig):
    """What all methods share, and what each has of its own."""

    zoo: dict[str, dict[str, Any]] = Field(min_length=1)
    """By name: the keys of `training` that differ, such as `{adapter: {type: ia3}, optimizer: {lr: 1.0e-2}}`. A
    section that is given replaces those of its keys that it names."""

    @model_validator(mode="after")
    def _methods_are_configs(self) -> PeftZooConfig:
        if len({name.casefold() for name in self.zoo}) < len(self.zoo):
            raise ValueError(f"zoo: got {list(self.zoo)}, expected names that differ by more than case; rename one")
        for name in self.zoo:
            if not re.fullmatch(r"\w[\w-]{0,63}", name):
                raise ValueError(f"zoo: got the name {name!r}, expected letters, digits, - and _; choose another")
            self.of(name)
        if not self.data.held_out:
            raise ValueError("data.held_out: got 0, expected examples to compare the methods on; set data.held_out")
        return self

    def of(self, name: str) -> SftRunConfig:
        """The run of one method."""
        shared = self.model_dump(mode="json", exclude={"zoo"}, exclude_unset=True)
        training = _merged(shared.pop("training", {}), self.zoo[name])
        try:
            return SftRunConfig.model_validate({**shared, "training": training})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"] if part != "training")
            if first["type"] == "extra_forbidden":
                raise ValueError(
                    f"zoo.{name}.{key}: got an unknown key, expected those of the section `training`, as `adapter`; "
                    "correct its name, or remove it"
                ) from error
            reason = first["msg"].removeprefix("Value error, ")
            if first["type"] != "value_error":
                reason = f"got {first['input']!r}, expected another value ({reason}); correct it"
            raise ValueError(f"{'.'.join(['zoo', name, *filter(None, [key])])}: {reason}") from error


def _merged(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(shared)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
