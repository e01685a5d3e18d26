"""Name the files of a published folder, and read config.json and adapter_config.json.

Anybody may have written the two.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from hftl.config.section import is_hub_id
from hftl.errors import RunFolderError
from hftl.runtime import paths
from hftl.runtime.run_folder import UnreadableJsonError, read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
CARD_FILE = "README.md"
HEAD_WEIGHTS = "head.safetensors"
THRESHOLDS_KEY = "label_thresholds"
"""In config.json, the probability above which each label of several is predicted; transformers
ignores it."""
LABEL_ID = re.compile(r"[0-9]{1,18}")
"""Python refuses to read a longer number."""


def read_json_mapping(path: Path) -> dict[str, object]:
    """Read the mapping in a JSON file; an empty one where there is no file.

    Raises:
        RunFolderError: if the file holds no mapping.
    """
    if not path.exists():
        return {}
    try:
        content = read_json(path)
    except (OSError, UnreadableJsonError) as error:
        raise _build_json_error(path) from error
    if not isinstance(content, dict):
        raise _build_json_error(path)
    return content


def _build_json_error(path: Path) -> RunFolderError:
    name = paths.get_display_name(path.parent)
    return RunFolderError(
        f"{name}: {path.name} is no mapping in JSON", f"Look closer: hftl doctor {name}"
    )


def drop_local_names(settings: dict[str, object]) -> dict[str, object]:
    """Return settings without the local paths that transformers writes into them."""
    return {k: v for k, v in settings.items() if k not in ("_name_or_path", "name_or_path")}


@dataclass(frozen=True)
class SettingsFile:
    """Hold a mapping in JSON of anybody's; a value of an unexpected type reads as missing."""

    FILE: ClassVar[str]
    settings: dict[str, object] = field(default_factory=dict)
    """All of them, as they stand in the file."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the settings of a folder; none where there is no such file.

        Raises:
            RunFolderError: if the file holds no mapping.
        """
        return cls(read_json_mapping(folder / cls.FILE))

    def get_text(self, key: str) -> str | None:
        """Return a text that is not empty."""
        value = self.settings.get(key)
        return value if isinstance(value, str) and value else None

    def get_names(self, key: str) -> list[str]:
        """Return a list of names; empty where it is missing."""
        names = self.settings.get(key)
        return list(map(str, names)) if isinstance(names, list) else []

    def get_mapping(self, key: str) -> dict[str, object]:
        """Return a mapping inside; empty where it is missing."""
        value = self.settings.get(key)
        return value if isinstance(value, dict) else {}


class ModelConfig(SettingsFile):
    """Hold the settings of config.json."""

    FILE = MODEL_CONFIG

    @property
    def class_names(self) -> list[str]:
        """Return the classes of transformers that it was made of, mostly one."""
        return self.get_names("architectures")

    @property
    def label_names(self) -> list[str]:
        """Return the label names in the order of their ids; empty where it has none."""
        if "id2label" not in self.settings:
            return self.get_names("label_names")  # as timm writes them
        names = self.get_mapping("id2label")
        if not all(LABEL_ID.fullmatch(str(key)) for key in names):
            return []
        return [str(names[key]) for key in sorted(names, key=lambda key: int(str(key)))]


class AdapterConfig(SettingsFile):
    """Hold the settings of adapter_config.json."""

    FILE = ADAPTER_CONFIG

    @property
    def base_name(self) -> str | None:
        """Return the hub id or path of the base."""
        return self.get_text("base_model_name_or_path")

    @property
    def base_hub_id(self) -> str | None:
        """Return the base's name where it reads as a hub id."""
        name = self.base_name
        return name if name and is_hub_id(name) else None

    @property
    def revision(self) -> str | None:
        """Return the commit of the base."""
        return self.get_text("revision")

    @property
    def task_type(self) -> str | None:
        """Return peft's name of the task, such as SEQ_CLS."""
        return self.get_text("task_type")

    @property
    def model_class(self) -> str | None:
        """Return the class of transformers, which peft writes where there is no task type."""
        name = self.get_mapping("auto_mapping").get("base_model_class")
        return name if isinstance(name, str) else None

    @property
    def modules_to_save(self) -> list[str]:
        """Return the modules that are saved whole beside the adapter."""
        return self.get_names("modules_to_save")

    def find_local_base(self, follow_paths: bool = True) -> Path | None:
        """Return the folder of this machine that is named as the base; None where there is none.

        Only a hub has commits, so a pinned hub id is never a folder here. A path counts where it is
        the folder of a model: no other file that a stranger may name is opened.
        """
        name = self.base_name
        is_pinned = self.base_hub_id is not None and self.revision is not None
        if not follow_paths or name is None or is_pinned or name.startswith(paths.PACKAGE_PREFIX):
            return None
        folder = paths.resolve_local_path(name, ADAPTER_CONFIG)
        return folder if folder is not None and (folder / MODEL_CONFIG).is_file() else None
