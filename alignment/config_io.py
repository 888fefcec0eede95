"""YAML and dotted overrides -> config; config -> YAML, help text, differences. Importable without torch.

Three layers, each over the last: the defaults in `alignment.config`, the file, the command line. Setting one key of
a section keeps the section's other defaults.
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, JsonValue, ValidationError
from pydantic.fields import FieldInfo

from alignment.config import SourceConfig

C = TypeVar("C", bound=BaseModel)

# Naming one of these replaces whichever of them a lower layer had named.
ALTERNATIVES: dict[type[BaseModel], frozenset[str]] = {SourceConfig: frozenset({"path", "hub", "asset"})}

PLAIN_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")


class _PlainLoader(yaml.SafeLoader):
    """YAML with scalars, lists and mappings only; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or (key_node.tag != "tag:yaml.org,2002:str" and key != "<<"):
                raise yaml.constructor.ConstructorError(None, None, "got a key that is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"got key {key!r} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_PlainLoader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix("tag:yaml.org,2002:") in PLAIN_TAGS
}
# YAML 1.1 reads 2024-01-31 as a date and 1e-5 as text; here they are text and a number.
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _PlainDumper(yaml.SafeDumper):
    """Quotes what `_PlainLoader` would not read as text."""


for _side in (_PlainLoader, _PlainDumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def load_config(cls: type[C], *, file: Path | None = None, overrides: Sequence[str] = ()) -> C:
    """Read `file`, put `overrides` over it, check everything.

    Args:
        cls: the config class.
        file: YAML; None or an empty file leaves the defaults.
        overrides: command-line words, `--section.key value` or `--section.key=value`; the last of a key wins.

    Raises:
        ValueError: one line per problem: dotted key, what was got, what is expected.
    """
    given = {} if file is None else read_yaml(file)
    data = _merge(cls, _merge(cls, _defaults(cls, None), given), _parse_overrides(cls, overrides))
    # JSON mode, because strict Python mode would refuse a list where a tuple is meant.
    try:
        return cls.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(cls, problem) for problem in error.errors(include_url=False)))
        origins = [str(file)] * (file is not None) + ["the command line"] * bool(overrides)
        where = f" from {' and '.join(origins)}" if origins else ""
        raise ValueError(f"{cls.__name__}{where}: {len(lines)} problem(s)\n" + "\n".join(lines)) from None


def read_yaml(file: Path) -> dict[str, Any]:
    """A mapping from a YAML file; {} from an empty one.

    Raises:
        ValueError: missing, not UTF-8, not YAML, a key given twice, a tag such as !!python/object, not a mapping.
    """
    if not file.is_file():
        raise ValueError(f"{file}: got no such file, expected a YAML file; check the path")
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: got byte {error.start} that is not UTF-8, expected UTF-8; save it as such"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: {_describe_yaml_error(error)}, expected plain YAML; correct that line") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"{file}: got a {type(data).__name__}, expected `section:` mappings at the top; correct it")
    return data


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML; `load_config` of it gives an equal config."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=119
    )


HELP_WIDTH = 119


def describe(cls: type[BaseModel]) -> str:
    """Help text: every dotted key with type, default and meaning."""
    lines = []
    for key, field, default in _leaves(cls, None):
        kind, start = f"  --{key} {_type_name(field)}", f"({_default_name(default)})"
        lines += [f"{kind} {start}"] if len(kind) + len(start) < HELP_WIDTH else [kind, f"        {start}"]
        lines += textwrap.wrap(field.description or "", 112, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def diff_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every dotted key that differs; `absent` stands for a key that one side lacks."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    show = {key: repr(value) for key, value in before.items()}, {key: repr(value) for key, value in after.items()}
    return [
        f"{key}: {show[0].get(key, 'absent')} -> {show[1].get(key, 'absent')}"
        for key in dict.fromkeys([*before, *after])
        if show[0].get(key) != show[1].get(key)
    ]


def _flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _lists(value)


def _lists(value: Any) -> Any:
    """A resolved config holds tuples, the one read back from YAML lists."""
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The config class of a nested section, None for a plain value."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _defaults(cls: type[BaseModel], default: BaseModel | None) -> dict[str, Any]:
    """What the class and its sections set on their own behalf, e.g. the critic's learning rate."""
    data: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        section = _section(field)
        own = default is not None and name in default.model_fields_set
        value = getattr(default, name) if own else field.default
        if section is not None and isinstance(value, BaseModel):
            data[name] = _defaults(section, value)
        elif own:
            data[name] = default.model_dump(mode="json", include={name})[name] if default is not None else None
    return data


def _merge(cls: type[BaseModel], lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    alternatives = ALTERNATIVES.get(cls, frozenset())
    dropped = alternatives if any(upper.get(name) is not None for name in alternatives) else frozenset()
    merged = {name: value for name, value in lower.items() if name not in dropped}
    for name, value in upper.items():
        field = cls.model_fields.get(name)
        section = None if field is None else _section(field)
        if section is not None and isinstance(value, Mapping):
            below = merged.get(name)
            merged[name] = _merge(section, below if isinstance(below, Mapping) else {}, value)
        else:
            merged[name] = value
    return merged


def _parse_overrides(cls: type[BaseModel], words: Sequence[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ValueError(f"got {word!r}, expected --section.key value; see --help for the keys")
        key, separator, text = word[2:].partition("=")
        if not separator:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"{key}: got no value, expected --{key} value; add one{_unknown_hint(cls, key)}")
            text = rest.pop(0)
        *sections, name = key.split(".")
        target = given
        for section in sections:
            inner = target.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{key}: got {section} as a value and as a section, expected one; remove one of them")
            target = inner
        target[name] = _parse_value(_field_at(cls, key), text)
    return given


def _parse_value(field: FieldInfo | None, text: str) -> Any:
    """YAML, but a field that holds text takes the words as they are: a commit hash may look like a number."""
    if field is not None and set(_members(field.annotation)) <= {str, type(None)}:
        return None if text == "null" and type(None) in _members(field.annotation) else text
    try:
        value = yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError:
        return text
    return text if isinstance(value, dict) and not text.lstrip().startswith("{") else value


def _members(annotation: Any) -> tuple[Any, ...]:
    """The parts of a union, or the one type, whatever bounds stand beside them."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(member for part in typing.get_args(annotation) for member in _members(part))
    return (annotation,)


def _field_at(cls: type[BaseModel], key: str) -> FieldInfo | None:
    *sections, name = key.split(".")
    for section in sections:
        inner = _section(cls.model_fields[section]) if section in cls.model_fields else None
        if inner is None:
            return None
        cls = inner
    return cls.model_fields.get(name)


def _leaves(cls: type[BaseModel], default: BaseModel | None, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    """Dotted key, field and effective default of every plain value."""
    for name, field in cls.model_fields.items():
        value = field.default if default is None else getattr(default, name)
        section = _section(field)
        if section is None:
            yield f"{prefix}{name}", field, value
        else:
            yield from _leaves(section, value if isinstance(value, BaseModel) else None, f"{prefix}{name}.")


def _nearest(cls: type[BaseModel], key: str) -> str | None:
    """The known dotted key most like `key`: by full path, else by its last part in any section."""
    known = [leaf for leaf, _, _ in _leaves(cls, None)]
    sections = {part.rpartition(".")[0] for part in known}
    sections |= {section.split(".")[0] for section in sections if section}
    full = difflib.get_close_matches(key, [*known, *sorted(sections - {""})], n=1, cutoff=0.75)
    last = key.rpartition(".")[2]
    names = {leaf.rpartition(".")[2]: leaf for leaf in reversed(known)}
    tail = difflib.get_close_matches(last, list(names), n=1, cutoff=0.75)
    if last in names and not full:
        return names[last]
    return full[0] if full else names[tail[0]] if tail else None


def _unknown_hint(cls: type[BaseModel], key: str) -> str:
    if _field_at(cls, key) is not None:
        return ""
    nearest = _nearest(cls, key)
    return f" (the key is unknown; nearest: {nearest})" if nearest else " (the key is unknown)"


def _explain(cls: type[BaseModel], problem: Any) -> str:
    """One line for one pydantic error."""
    key, field, siblings = _locate(cls, problem["loc"])
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key.rpartition(".")[2], siblings, n=1)
        nearest = f"{key.rpartition('.')[0]}.{near[0]}".lstrip(".") if near else _nearest(cls, key)
        remedy = f"did you mean {nearest}?" if nearest else "see --help for the keys"
        return f"{key}: got an unknown key, expected one of this config's; {remedy}"
    if kind == "json_invalid":
        return "got text that is not Unicode, expected UTF-8; correct the words on the command line"
    if kind == "missing":
        return f"{key}: got nothing, expected a value; set it"
    if kind == "value_error":
        text = str(problem["ctx"]["error"])
        return text if not key or text.startswith((f"{key}:", f"{key}.")) else f"{key}: {text}"
    got = json.dumps(value, ensure_ascii=False)
    got = got if len(got) <= 60 else f"{got[:57]}..."
    if kind == "model_type":
        return f"{key}: got {got}, expected a section of `key: value` lines; give it some or remove it"
    of_field = field is not None and not isinstance(problem["loc"][-1], int)
    expected = _type_name(field) if field is not None and of_field else problem["msg"].removeprefix("Input should be ")
    if kind == "finite_number" and of_field:
        expected = f"finite {expected}"
    remedy = "quote it" if kind == "string_type" and isinstance(value, int | float) else "correct it"
    return f"{key}: got {got}, expected {expected}; {remedy}"


def _locate(cls: type[BaseModel], location: Sequence[int | str]) -> tuple[str, FieldInfo | None, list[str]]:
    """Dotted key, field and sibling names of a pydantic location, without the labels of union members."""
    parts: list[str] = []
    field: FieldInfo | None = None
    siblings: list[str] = []
    model: type[BaseModel] | None = cls
    for part in location:
        if isinstance(part, int):
            parts.append(str(part))
            model = _item_model(field)
        elif model is not None:
            parts.append(part)
            siblings = list(model.model_fields)
            field = model.model_fields.get(part)
            model = _section(field) if field is not None else None
    return ".".join(parts), field, siblings


def _item_model(field: FieldInfo | None) -> type[BaseModel] | None:
    for argument in typing.get_args(field.annotation) if field is not None else ():
        if isinstance(argument, type) and issubclass(argument, BaseModel):
            return argument
    return None


def _type_name(field: FieldInfo) -> str:
    limits = {
        word: getattr(rule, name)
        for rule in field.metadata
        for name, word in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if getattr(rule, name, None) is not None
    }
    bounds = " and ".join(f"{word} {limit:g}" for word, limit in limits.items())
    return f"{_annotation_name(field.annotation)}{f' {bounds}' if bounds else ''}"


def _annotation_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(FieldInfo.from_annotation(annotation))
    if origin is typing.Literal:
        return "|".join(str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_annotation_name(part) for part in arguments)
    if origin is dict:
        return f"{{name: {_annotation_name(arguments[1])}}}"
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_annotation_name(arguments[0])}"
        return f"[{', '.join(_annotation_name(part) for part in arguments)}]"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{{{', '.join(annotation.model_fields)}}}"
    names = {type(None): "null", str: "text", float: "number", int: "integer", bool: "true|false"}
    return {**names, Any: "value", JsonValue: "value"}[annotation]


def _default_name(default: Any) -> str:
    if default is None:
        return "default null"
    if type(default).__name__ == "PydanticUndefinedType":
        return "required"
    text = default if isinstance(default, str) else json.dumps(default, default=lambda model: model.model_dump())
    return f"default {text}"


def _describe_yaml_error(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        line = f"line {mark.line + 1}: " if mark is not None else ""
        problem = error.problem or error.context or "it is not YAML"
        return f"{line}{problem}" if problem.startswith("got ") else f"{line}got {problem}"
    return f"got {' '.join(str(error).split())}"
