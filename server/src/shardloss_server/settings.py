"""The one settings object of a server: flag > environment > TOML file > default; unknown names are errors."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import pydantic
from pydantic import ValidationError, create_model
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from shardloss_server.config import Limits, Listening, Security, ServerConfig, Watching, Workers

ENV_PREFIX = "SHARDLOSS_SERVER_"
G = TypeVar("G")
FILE_VARIABLE = f"{ENV_PREFIX}CONFIG"  # where the file is; no setting itself
SECTIONS: Mapping[str, type] = {
    "Listening": Listening,
    "Workers": Workers,
    "Limits": Limits,
    "Security": Security,
    "Watching": Watching,
}


class BadSettings(Exception):
    """A setting that is unknown or wrong: says which, where it came from and what was found."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: `annotation` holds type, bounds and meaning."""

    name: str
    section: str
    annotation: Any
    field: Field[Any]

    @property
    def flag(self) -> str:
        """Its flag of `serve`."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return ENV_PREFIX + self.name.upper()

    @property
    def meaning(self) -> str:
        """What it is, in one sentence."""
        return str(self.annotation.__metadata__[0].description)

    def field_default(self) -> Any:
        """Its default, as pydantic takes it."""
        if self.field.default_factory is not MISSING:
            return pydantic.Field(default_factory=self.field.default_factory)
        return self.field.default


def settings_of(section: str, group: type) -> list[Setting]:
    """The settings that a dataclass defines."""
    hints = get_type_hints(group, include_extras=True)
    return [Setting(f.name, section, hints[f.name], f) for f in fields(group)]


ALL: Mapping[str, Setting] = {
    setting.name: setting for section, group in SECTIONS.items() for setting in settings_of(section, group)
}


class Sources(BaseSettings):
    """Where values come from: the first that has one wins."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", env_ignore_empty=True, frozen=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  (the library's signature)
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting's value, and where each came from: "flag", "environment", "file" or "default"."""

    values: Mapping[str, Any]
    sources: Mapping[str, str]

    @staticmethod
    def load(flags: Mapping[str, Any], file: Path | None = None) -> Settings:
        """Settings from flags, the environment and a TOML file (or the one that SHARDLOSS_SERVER_CONFIG names).

        Raises:
            BadSettings: one is unknown or wrong, or the file cannot be read.
        """
        named = os.environ.get(FILE_VARIABLE)
        file = file or (Path(named) if named else None)
        in_file, in_environment = keys_of(file), variables()
        try:
            values = made(file)(**flags).model_dump()
        except ValidationError as error:
            found = {"flag": flags, "environment": in_environment, "file": in_file}
            raise BadSettings("\n".join(complaint(each, found, file) for each in error.errors())) from None
        return Settings(values, {name: source_of(name, flags, in_environment, in_file) for name in ALL})

    def group(self, kind: type[G]) -> G:
        """The settings of one section."""
        return kind(**{field.name: self.values[field.name] for field in fields(cast(Any, kind))})

    def server(self) -> ServerConfig:
        """What a running server is made of."""
        return ServerConfig(*(self.group(kind) for kind in (Listening, Limits, Security, Watching)))  # type: ignore[arg-type]


def made(file: Path | None) -> type[Sources]:
    """The settings class, reading this file."""
    every: dict[str, Any] = {name: (setting.annotation, setting.field_default()) for name, setting in ALL.items()}
    config = {"__module__": __name__, "model_config": SettingsConfigDict(toml_file=file)}
    return create_model("Settings", __base__=type("WithFile", (Sources,), config), **every)


def schema() -> dict[str, Any]:
    """JSON schema of the file, and of all settings by name."""
    return made(None).model_json_schema()


def keys_of(file: Path | None) -> Mapping[str, Any]:
    """What a settings file holds.

    Raises:
        BadSettings: it cannot be read, or is no TOML.
    """
    if file is None:
        return {}
    try:
        return tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadSettings(f"cannot read the settings file {file}: {error}") from None


def variables() -> Mapping[str, str]:
    """The settings in the environment; empty ones are absent.

    Raises:
        BadSettings: a variable of ours, in whatever case, is no setting.
    """
    ours = {  # in small letters the library would take it, and nobody could tell where the value came from
        name: value
        for name, value in os.environ.items()
        if name.upper().startswith(ENV_PREFIX) and name != FILE_VARIABLE
    }
    known = {setting.variable: name for name, setting in ALL.items()}
    for name in ours.keys() - known.keys():
        raise BadSettings(f"{name} in the environment is no setting{like(name.upper(), [*known, FILE_VARIABLE])}")
    return {known[name]: value for name, value in ours.items() if value}


def source_of(name: str, *sources: Mapping[str, Any]) -> str:
    """Which source a setting's value came from."""
    names = ("flag", "environment", "file")
    return next((kind for kind, source in zip(names, sources, strict=True) if name in source), "default")


def complaint(error: ErrorDetails, found: Mapping[str, Mapping[str, Any]], file: Path | None) -> str:
    """What is wrong with a setting, in one line: where, what was found, what it must be."""
    name = str(error["loc"][0])
    kind = source_of(name, *found.values())
    if name not in ALL:
        return f"{name} in {file} is no setting{like(name, ALL)}"
    setting = ALL[name]
    where = {"flag": setting.flag, "environment": setting.variable}.get(kind, f"{name} in {file}")
    return f"{where} = {found[kind][name]!r}: {error['msg']}. It is: {setting.meaning}"


def like(name: str, known: Iterable[str]) -> str:
    """A hint at the name that was probably meant."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else "; `shardloss-server config show` lists all"
