"""A model's chat template: Jinja text from its tokenizer's folder, rendered in a sandbox."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsjax.hf.folder import read_json

_SETTINGS = "tokenizer_config.json"
_FILE = "chat_template.jinja"


class ChatTemplate:
    """Turns messages into the text a model was trained on."""

    def __init__(self, template: str, bos_token: str = "", eos_token: str = "") -> None:
        """ValueError if the template is not valid Jinja."""
        self.bos_token, self.eos_token = bos_token, eos_token
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(template)
        except (TemplateError, TypeError, RecursionError) as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from error

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> "ChatTemplate":
        """Reads `chat_template.jinja` or the template in `tokenizer_config.json`."""
        folder = Path(path)
        settings = read_json(folder / _SETTINGS)
        template = _template_text(folder, settings)
        bos, eos = (_token(folder, settings, key) for key in ("bos_token", "eos_token"))
        try:
            return cls(template, bos, eos)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt; ValueError if messages lack roles or the template refuses them."""
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f"message {message!r}: expected a mapping with a role")
        values = {
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "raise_exception": _raise,
        }
        try:
            return self._template.render(variables | values)
        except Exception as error:  # A template is foreign code: whatever it raises is its fault.
            raise ValueError(f"the chat template failed: {error}") from error


def _template_text(folder: Path, settings: dict[str, Any]) -> str:
    if (folder / _FILE).is_file():
        try:
            return (folder / _FILE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{folder / _FILE}: cannot be read: {error}") from error
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = [t for t in found if isinstance(t, dict) and t.get("name") == "default"]
        found = named[0].get("template") if named else None
    if not isinstance(found, str):
        raise ValueError(f"{folder / _SETTINGS}: no chat_template in it and no {_FILE} beside it")
    return found


def _token(folder: Path, settings: dict[str, Any], key: str) -> str:
    """A special token, spelled as text or as a table with `content`."""
    found = settings.get(key)
    if isinstance(found, dict):
        found = found.get("content")
    if found is not None and not isinstance(found, str):
        raise ValueError(f"{folder / _SETTINGS}: {key} is {settings[key]!r}: expected text")
    return found or ""


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which no prompt wants."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
