"""Loading of a server's settings from flags, the environment, a TOML file and defaults, in this order of precedence.

Unknown names are errors.
"""

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

from shardloss_server.access.watched import Unreadable, text_in
from shardloss_server.config import Limits, Listening, Security, ServerConfig, Watching, Workers

ENV_PREFIX = "SHARDLOSS_SERVER_"
G = TypeVar("G")
FILE_VARIABLE = f"{ENV_PREFIX}CONFIG"  # path of the TOML file; not a setting itself
SECTIONS: Mapping[str, type] = {
    "Listening": Listening,
    "Workers": Workers,
    "Limits": Limits,
    "Security": Security,
    "Watching": Watching,
}


class BadSettings(Exception):
    """An unknown or invalid setting; the message names it, its source and the value found."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting; `annotation` holds its type, bounds and meaning."""

    name: str
    section: str
    annotation: Any
    field: Field[Any]

    @property
    def flag(self) -> str:
        """The setting's flag for `shardloss-server serve`."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The setting's environment variable."""
        return ENV_PREFIX + self.name.upper()

    @property
    def meaning(self) -> str:
        """The setting's meaning, in one sentence."""
        return str(self.annotation.__metadata__[0].description)

    def field_default(self) -> Any:
        """Return the setting's default in the form that pydantic accepts."""
        if self.field.default_factory is not MISSING:
            return pydantic.Field(default_factory=self.field.default_factory)
        return self.field.default


def settings_of(section: str, group: type) -> list[Setting]:
    """Return the settings that a dataclass defines."""
    hints = get_type_hints(group, include_extras=True)
    return [Setting(f.name, section, hints[f.name], f) for f in fields(group)]


ALL: Mapping[str, Setting] = {
    setting.name: setting for section, group in SECTIONS.items() for setting in settings_of(section, group)
}


class Sources(BaseSettings):
    """The sources of values; the first source that has a value wins."""

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
        """Return the sources in order of precedence: flags, the environment, the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


@dataclass(frozen=True, slots=True)
class Settings:
    """The value of every setting, and its source: "flag", "environment", "file" or "default"."""

    values: Mapping[str, Any]
    sources: Mapping[str, str]

    @staticmethod
    def load(flags: Mapping[str, Any], file: Path | None = None) -> Settings:
        """Load settings from flags, the environment and a TOML file, by default the one in SHARDLOSS_SERVER_CONFIG.

        Raises:
            BadSettings: a setting is unknown or invalid, or the file cannot be read.
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
        """Return the settings of one section."""
        return kind(**{field.name: self.values[field.name] for field in fields(cast(Any, kind))})

    def server(self) -> ServerConfig:
        """Return the settings of a running server, except those of its workers."""
        return ServerConfig(*(self.group(kind) for kind in (Listening, Limits, Security, Watching)))  # type: ignore[arg-type]


def made(file: Path | None) -> type[Sources]:
    """Return the settings class that reads this file."""
    every: dict[str, Any] = {name: (setting.annotation, setting.field_default()) for name, setting in ALL.items()}
    config = {"__module__": __name__, "model_config": SettingsConfigDict(toml_file=file)}
    return create_model("Settings", __base__=type("WithFile", (Sources,), config), **every)


def schema() -> dict[str, Any]:
    """Return the JSON schema of a settings file, with every setting by name."""
    return made(None).model_json_schema()


def keys_of(file: Path | None) -> Mapping[str, Any]:
    """Return the keys and values of a settings file; none without a file.

    Raises:
        BadSettings: the file cannot be read or is not TOML.
    """
    if file is None:
        return {}
    try:
        return tomllib.loads(text_in(file, "the settings file"))
    except Unreadable as error:
        raise BadSettings(str(error)) from None
    except tomllib.TOMLDecodeError as error:
        raise BadSettings(f"cannot read the settings file {file}: it is not TOML: {error}") from None


def variables() -> Mapping[str, str]:
    """Return the settings in the environment; empty variables count as absent.

    Raises:
        BadSettings: a variable with our prefix, in upper or lower case, is not a setting.
    """
    ours = {  # the library also accepts lower case, but then the value's source could not be reported
        name: value
        for name, value in os.environ.items()
        if name.upper().startswith(ENV_PREFIX) and name != FILE_VARIABLE
    }
    known = {setting.variable: name for name, setting in ALL.items()}
    for name in ours.keys() - known.keys():
        raise BadSettings(f"{name} in the environment is not a setting{like(name.upper(), [*known, FILE_VARIABLE])}")
    return {known[name]: value for name, value in ours.items() if value}


def source_of(name: str, *sources: Mapping[str, Any]) -> str:
    """Return the source of a setting's value."""
    names = ("flag", "environment", "file")
    return next((kind for kind, source in zip(names, sources, strict=True) if name in source), "default")


def complaint(error: ErrorDetails, found: Mapping[str, Mapping[str, Any]], file: Path | None) -> str:
    """Return one line about an invalid setting: its source, the value found, the error and the setting's meaning."""
    name = str(error["loc"][0])
    kind = source_of(name, *found.values())
    if name not in ALL:
        return f"{name} in {file} is not a setting{like(name, ALL)}"
    setting = ALL[name]
    where = {"flag": setting.flag, "environment": setting.variable}.get(kind, f"{name} in {file}")
    return f"{where} = {found[kind][name]!r}: {error['msg']}. Meaning: {setting.meaning}"


def like(name: str, known: Iterable[str]) -> str:
    """Return a hint about the name that was probably meant."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else "; `shardloss-server config show` lists all settings"
