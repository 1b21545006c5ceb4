"""YAML file + ``section.key=value`` overrides → :class:`Config`, and the reverse; every mistake becomes one ``UserError``."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from nft_megatron.base.errors import UserError
from nft_megatron.base.imported import ImportPath
from nft_megatron.base.paths import expand
from nft_megatron.config.renamed import RENAMED, is_record, translate
from nft_megatron.config.schema import DEFAULT_ALGORITHM, Config
from nft_megatron.config.yaml import dump_yaml, parse_yaml, read_sections


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read ``path``, apply ``overrides`` in order (``train.num_steps=3``; values are YAML), check everything.

    A renamed key is an error, except in the file that an earlier run left in its own folder.

    Raises :class:`UserError` that names the field, its value and the remedy.
    """
    try:
        path = expand(path)
    except ValueError as error:
        raise UserError("CONFIG", path, str(error), "give the path of a YAML file; examples/ has some") from error
    if not path.is_file():
        raise UserError("CONFIG", path, "no such file", "give the path of a YAML file; examples/ has some")
    tree = read_sections(path)
    if is_record(path):
        translate(tree)
    return config_from(tree, overrides)


def config_from(tree: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The configuration in ``tree`` (modified in place) after ``overrides``. Raises as :func:`load_config` does."""
    for override in overrides:
        apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise _readable(error) from error


def dump_config(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that :func:`load_config` reads back as an equal one."""
    return dump_yaml(config.model_dump(mode="json"))


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A nested configuration flattened to one key per value, in order; an empty section leaves none.

    >>> flatten({"seed": 3, "train": {"num_steps": 5}, "rollout": {"stop": ["\\n"]}})
    {'seed': 3, 'train.num_steps': 5, 'rollout.stop': ['\\n']}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set in ``tree``, in place, what ``override`` says. Raises :class:`UserError` if it is no ``section.key=value``."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError("override", override, "is not of the form section.key=value", "for example train.num_steps=100")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise UserError(key, text, f"not readable as a YAML value: {error}", "quote it") from error
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(key, value, f"'{section}' is a value, not a section", f"drop what follows '{section}'")
    tree[leaf] = value


def config_help() -> str:
    """Every field with its type, default and docstring, section by section, as plain text."""
    lines = []
    for section, model in _sections():
        document = (model.__doc__ or "").strip().splitlines()[0]
        lines += ["", f"{section}: {document}" if section else "Top level"]
        for name, field in model.model_fields.items():
            if section or not _models_of(field):
                lines.append(f"  {name}  ({_type_name(field.annotation)}; {_default(section, name, field)})")
                lines += [f"      {line.strip()}" for line in (field.description or "").splitlines()]
    return "\n".join(lines).strip()


def override_values() -> dict[str, list[str]]:
    """Every key that an override may name, each with the values that it may have where those are few.

    >>> override_values()["rollout.engine"], override_values()["train.num_steps"]
    (['embedded', 'vllm'], [])
    """
    found: dict[str, list[str]] = {}
    for section, model in _sections():
        for name, field in model.model_fields.items():
            if not _models_of(field):
                values = found.setdefault(f"{section}.{name}" if section else name, [])
                values += [value for value in _words_of(field.annotation) if value not in values]
    return found


def _words_of(annotation: Any) -> list[str]:
    """The values of ``annotation`` that can be listed."""
    if annotation in (bool, type(None)):
        return ["true", "false"] if annotation is bool else ["null"]
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return list(map(str, arguments))
    return [word for argument in arguments for word in _words_of(argument)]


def _default(section: str, name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if section == "algorithm" and name == "name" and value != DEFAULT_ALGORITHM:
        return "required"
    return f"default {_shown(value)}"


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    yield "", Config
    for name, field in Config.model_fields.items():
        for model in _models_of(field):
            yield name, model


def _models_of(field: FieldInfo) -> tuple[type[BaseModel], ...]:
    """The config models a field may hold: several for ``algorithm``, none for a plain value."""
    options = typing.get_args(field.annotation) or (field.annotation,)
    return tuple(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation == ImportPath:
        return "module:name"
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(argument) for argument in arguments)
    if origin is dict:
        return "a section of names and values"
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    return {type(None): "null", Path: "path", str: "text", int: "integer", float: "number", bool: "true | false"}[annotation]


def _shown(value: Any) -> str:
    return "null" if value is None else "[]" if value == () else str(value).lower() if isinstance(value, bool) else repr(value)


def _readable(error: ValidationError) -> UserError:
    """The first mistake with its remedy, and the number of further ones."""
    first, *others = error.errors()
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return cause
    # pydantic appends the branch of a union that failed to the path, and inserts the algorithm's name
    path = [str(part) for part in first["loc"] if part not in _ALGORITHMS][:2]
    field, value, kind = ".".join(path), first["input"], first["type"]
    more = f" ({len(others)} more mistakes follow)" if len({other["loc"][:2] for other in others} - {first["loc"][:2]}) else ""
    if kind == "extra_forbidden":
        return UserError(field, value, "no such key" + more, _nearest(path))
    if kind == "invalid_key":
        return UserError(field, value, "is no text, as a key must be" + more, "check the line for a stray comma or colon")
    if kind.startswith("model_") and value is None:
        return UserError(field, "(nothing)", "is a section without keys" + more, "give it one, or remove its line")
    if kind == "missing":
        return UserError(field, "(nothing)", "is required" + more, f"add it to the file or as {field}=…")
    if kind == "too_short":
        return UserError(field, value, "is empty" + more, "name at least one")
    if isinstance(cause, ValueError):
        return UserError(field, value, str(cause) + more, f"the type is {_expected(path)}")
    if kind == "literal_error" and others and others[0]["loc"][:2] == first["loc"][:2]:  # a word or something else is valid
        expected = _expected(path)
        positive = " > 0" if expected.endswith("number") else ""
        return UserError(field, value, "is not allowed" + more, f"the type is {expected}{positive}")
    if kind.startswith("union_tag"):
        return UserError(
            "algorithm.name", value["name"], "no such algorithm" + more, f"one of {', '.join(_ALGORITHMS)}, or module:Class"
        )
    return UserError(
        field, value, first["msg"] + more, f"the type is {_expected(path)}; `nft-megatron train --help` explains it"
    )


_ALGORITHMS = [model.model_fields["name"].annotation.__args__[0] for model in _models_of(Config.model_fields["algorithm"])]  # type: ignore[union-attr]


def _expected(path: list[str]) -> str:
    """The type of the field at ``path``, in words."""
    *parents, leaf = path
    for section, model in _sections():
        if section == ".".join(parents) and leaf in model.model_fields:
            models = _models_of(model.model_fields[leaf])
            return (
                f"a section with {', '.join(models[0].model_fields)}"
                if models
                else _type_name(model.model_fields[leaf].annotation)
            )
    raise AssertionError(f"pydantic reported an unknown field: {path}")


def _nearest(path: list[str]) -> str:
    """The key that was probably meant: first from the same section, then of that name anywhere."""
    if new := RENAMED.get(".".join(path)):
        return f"it is now called '{new}'"
    *parents, leaf = path
    if "." in leaf:  # in a file; an override's key is taken apart
        section, _, key = leaf.partition(".")
        return f"in a file, write '{key}' indented under '{section}:'"
    owners = [model for section, model in _sections() if [section] == parents and leaf in model.model_fields]
    if owners:  # another algorithm's
        names = ", ".join(model.model_fields["name"].default for model in owners)
        return f"it belongs to {parents[0]}.name = {names}"
    known: dict[str, str] = {}
    for section, model in _sections():
        for name in model.model_fields:
            full = f"{section}.{name}" if section else name
            if section == ".".join(parents):
                known[name] = full
    close = difflib.get_close_matches(leaf, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{known[close[0]]}'?"
    everywhere = {name: f"{section}.{name}" for section, model in _sections() if section for name in model.model_fields}
    close = difflib.get_close_matches(leaf, everywhere, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{everywhere[close[0]]}'?"
    return f"known keys: {', '.join(known)}" if known else "`nft-megatron train --help` lists all keys"
