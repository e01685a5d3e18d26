"""Find settings by which a loader runs foreign code, or reads a file outside of their folder.

transformers runs code of a repository only with `trust_remote_code`, which hftl never sets; what is
refused here works without it.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from hftl.runtime.paths import leaves_folder
from hftl.runtime.run_folder import UnreadableJsonError, read_json

CODE_KEYS = ("auto_map", "_attn_implementation_internal", "custom_pipelines")
"""Keys of any settings file that name code to be fetched or imported."""
TRUSTED_LIBRARIES = ("transformers", "peft")
IMPORTING_KEYS = ("megatron_config", "megatron_core", "tokenizer_kwargs", "runtime_config")
"""Keys of adapter_config.json whose values peft imports or passes on."""
HARMLESS_VALUES = {"megatron_core": "megatron.core"}
"""Values that peft itself writes."""
KERNEL_KEYS = re.compile(r"_?(attn|experts)_implementation(_internal)?")
"""Keys of config.json under which transformers fetches a kernel of that hub id, and runs it."""
TIMM_LOADING_KEYS = (
    "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
    "pretrained_model_args", "cache_dir", "scriptable",
)  # fmt: skip
"""Arguments of `timm.create_model`, which config.json holds under `model_args`, that read or fetch
weights, or say where they lie."""
LEFT_FILE_KEYS = (
    "special_tokens_map_file", "tokenizer_file", "added_tokens_file", "tokenizer_config_file",
)  # fmt: skip
"""Keys of tokenizer_config.json in which older transformers left paths of the machine that saved
the tokenizer; no loader reads them there."""
VOCABULARY_KEYS = ("vocab", "merges")
"""Keys of a tokenizer's settings under which a text is the name of a file, which transformers opens
from the working directory."""
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files whose keys are arguments of the tokenizer; those of the second one win."""
READ_SETTINGS = ("adapter_config.json", "config.json", *TOKENIZER_SETTINGS)
READ_SUFFIXES = (".json", ".txt", ".model", ".jinja")
TEMPLATES = "additional_chat_templates"
MAX_SETTINGS_BYTES = 20_000_000


def walk_items(value: object) -> Iterator[tuple[str, object]]:
    """Yield every key with its value, however deep."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from ((str(key), inner) for key, inner in item.items())
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def brings_code(key: str, value: object) -> bool:
    """Return whether a setting names code, which a loader may be allowed to run."""
    if key in CODE_KEYS or (key == "trust_remote_code" and value):
        return value not in (None, {}, "")
    return names_kernel(key, value)


def names_kernel(key: str, value: object) -> bool:
    """Return whether a setting names a kernel on a hub."""
    return KERNEL_KEYS.fullmatch(key) is not None and "/" in str(value)


def list_imports(settings: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield each key of an adapter's settings by which peft imports a module, and what it does."""
    mapping = settings.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if library is not None and str(library).split(".")[0] not in TRUSTED_LIBRARIES:
        yield "auto_mapping", f"auto_mapping imports {library!r}"
    for key in IMPORTING_KEYS:
        if settings.get(key) not in (None, {}, HARMLESS_VALUES.get(key)):
            yield key, f"{key} makes peft import or pass on what it names"


def list_timm_loads(settings: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield each argument for timm that loads a file, at any depth of a config.json: the image half
    of a vision-language model may be timm's."""
    for name, arguments in walk_items(settings):
        if name != "model_args" or not isinstance(arguments, dict):
            continue
        for key in TIMM_LOADING_KEYS:
            if arguments.get(key) not in (None, False, "", {}):
                yield f"model_args.{key}", f"model_args.{key} makes timm load what it names"


def find_outside_shard(index: Mapping[str, object]) -> str | None:
    """Return the first file of an index of weights that lies outside of its folder."""
    shards = index.get("weight_map")
    files = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    return next((file for file in sorted(files) if "/" in file or "\\" in file), None)


def find_outside_template(settings: Mapping[str, object]) -> str | None:
    """Return the first chat template whose name is a path, to which it would be saved."""
    templates = settings.get("chat_template")
    if isinstance(templates, dict):
        names = list(map(str, templates))
    elif isinstance(templates, list):
        names = [str(item.get("name", "")) for item in templates if isinstance(item, dict)]
    else:
        names = []
    return next((name for name in names if "/" in name or "\\" in name or ".." in name), None)


def names_outside_file(key: str, value: object) -> bool:
    """Return whether a setting names a file, or one of a list, that may lie outside its folder."""
    if key in VOCABULARY_KEYS:
        return isinstance(value, str)
    names = value if isinstance(value, list) else [value]
    texts = [name for name in names if isinstance(name, str)]
    return key.removesuffix("s").endswith("_file") and any(map(leaves_folder, texts))


def find_foreign_setting(folder: Path, may_link: bool = False) -> str | None:
    """Return what is wrong with the first setting of a folder that a loader must not see.

    Args:
        folder: of a model, adapter, tokenizer or processor of anybody's.
        may_link: whether its files may be links, as installers make of packages.

    Returns:
        The file and what its key does; None where there is no such setting, or no readable file.
    """
    for path in _list_read_files(folder):
        name = path.relative_to(folder).as_posix()
        if not may_link and _is_outside_link(path, folder):
            return f"{name} is a link that leads out of the folder, and no file of it"
        if name in READ_SETTINGS or name.endswith(".index.json"):
            if path.exists() and path.stat().st_size > MAX_SETTINGS_BYTES:
                return f"{name} is larger than {MAX_SETTINGS_BYTES:,} bytes"
            why = _find_fault(name, _read_settings(path))
            if why is not None:
                return f"{name}: {why}"
    return None


def _list_read_files(folder: Path) -> list[Path]:
    """Return the settings, vocabularies and templates of a folder, all that is published again."""
    places = [folder, folder / TEMPLATES]
    files = [path for place in places if place.is_dir() for path in place.iterdir()]
    return sorted(path for path in files if path.suffix in READ_SUFFIXES or path.name == TEMPLATES)


def _is_outside_link(path: Path, folder: Path) -> bool:
    """Return whether a file is a link that leads out of a folder, but for one into a hub's cache.

    A snapshot of the cache is made of such links, and older clients put them into folders of one's
    own.
    """
    if not path.is_symlink():
        return False
    target = path.resolve()
    is_cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return not is_cached and not target.is_relative_to(folder.resolve())


def _read_settings(path: Path) -> Mapping[str, object]:
    """Return a mapping in JSON; an empty one where it cannot be read, which its loader reports."""
    try:
        content = read_json(path)
    except (OSError, UnreadableJsonError):
        return {}
    return content if isinstance(content, dict) else {}


def _find_fault(name: str, settings: Mapping[str, object]) -> str | None:
    if name.endswith(".index.json"):
        shard = find_outside_shard(settings)
        return shard and f"names a file outside of the folder: {shard}"
    if name == "adapter_config.json":
        # AutoPeftModel alone imports what auto_mapping names, and is not used here; it names
        # __main__ where a script has defined the base's class.
        faults = (what for key, what in list_imports(settings) if key != "auto_mapping")
        return next(faults, None)
    if name == "config.json":
        return _find_config_fault(settings)
    if name in TOKENIZER_SETTINGS:
        return _find_tokenizer_fault(settings, is_config=name == TOKENIZER_SETTINGS[0])
    return None


def _find_config_fault(settings: Mapping[str, object]) -> str | None:
    for key, value in walk_items(settings):
        if names_kernel(key, value):
            return f"{key} makes the loader run code of {value}"
    return next((what for _, what in list_timm_loads(settings)), None)


def _find_tokenizer_fault(settings: Mapping[str, object], is_config: bool) -> str | None:
    for key, value in settings.items():
        if is_config:
            is_outside = key not in LEFT_FILE_KEYS and names_outside_file(key, value)
        else:
            # It holds tokens, and what it names would be opened from the working directory.
            is_outside = key in VOCABULARY_KEYS or key.endswith("_file")
        if is_outside:
            return f"{key} names a file outside of the folder: {value}"
    template = find_outside_template(settings)
    return template and f"chat_template would be written to {template}"
