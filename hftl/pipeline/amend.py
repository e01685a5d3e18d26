"""Amend a run that is pushed: write repository and base into record, cards and adapter config."""

import json
from pathlib import Path

from hftl.card.card import render_adaptation_card, render_card
from hftl.card.metadata import build_benchmark_files, find_first_timestamp
from hftl.measure.record import PUBLISHED_FILE, RECORD_FILE, Forced, Published, Record
from hftl.publish.sanitize import sanitize_record


def amend_record(
    record: Record, repo_id: str, forced: str | None, base: tuple[str, str] | None,
    license: str | None = None,
) -> Record:  # fmt: skip
    """Return the record with what is only known once it is pushed.

    Args:
        record: the run's.
        repo_id: the repository.
        forced: the reason, where the verdict is hold.
        base: the id and commit of the base that an adapter applies to, once it is pushed.
        license: wins over the recipe's; where it is None, that of an earlier push.
    """
    license = license or (record.published and record.published.license)
    published = Published.model_validate(
        {"repo_id": repo_id} | ({"license": license} if license else {})
    )
    tree = record.to_dict() | {"published": published.to_dict()}
    tree.pop("forced", None)
    if forced is not None:
        tree["forced"] = Forced(reason=forced).to_dict()
    adapted = (tree["adapt"] or {}).get("base")
    if adapted is not None:
        adapted.pop("published_as", None)
        adapted.pop("revision", None)
    if base is not None:
        (adapted or tree["source"]).update(published_as=base[0], revision=base[1])
    return Record.parse(tree)


def render_amended_files(run: Path, record: Record, base: tuple[str, str] | None) -> dict[str, str]:
    """Return the files of a run that tell what is only known once it is pushed, by path."""
    before = json.loads((run / "publish" / PUBLISHED_FILE).read_text(encoding="utf-8"))
    examples = {key: before[key] for key in ("examples", "widget") if key in before}
    published = Record.parse(sanitize_record(record).to_dict() | examples)
    render = render_card if record.arms else render_adaptation_card
    texts = {
        RECORD_FILE: record.to_json(),
        "publish/README.md": render(published, published.place),
        f"publish/{PUBLISHED_FILE}": published.to_json(),
    }
    if record.arms:
        files = build_benchmark_files(published, find_first_timestamp(run / "publish"))
        texts |= {f"publish/{name}": text for name, text in files.items()}
    if base is not None:
        path = run / "publish" / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"base_model_name_or_path": base[0], "revision": base[1]}
        texts["publish/adapter_config.json"] = (
            json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        )
    return texts


def render_adapted_base_files(record: Record, base_id: str) -> dict[str, str]:
    """Return the same files of the adapted base."""
    published = sanitize_record(record).model_copy(update={"weight_files": None})
    return {
        "publish-base/README.md": render_adaptation_card(published, base_id),
        f"publish-base/{PUBLISHED_FILE}": published.to_json(),
    }
