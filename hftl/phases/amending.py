"""What is only known once a run is pushed, written into its record, cards and adapter config."""

import copy
import json
from pathlib import Path
from typing import Any

from hftl.card.adaptation import render_adapted
from hftl.card.benchmark import benchmark_files
from hftl.card.card import render_card
from hftl.phases.publishing import first_written, report
from hftl.publish.told import place_of, publishable
from hftl.record import to_json


def amend(
    record: dict[str, Any], repo_id: str, forced: str | None, base: tuple[str, str] | None,
    license: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The record with what is only known once it is pushed.

    Args:
        record: the run's.
        repo_id: where it goes.
        forced: why, where the verdict is hold.
        base: the id and commit of the base that an adapter goes on, once it is there.
        license: what wins over the recipe's; as an earlier push was given it where it is None.
    """
    tree = copy.deepcopy(record)
    license = license or (record.get("published") or {}).get("license")
    tree["published"] = {"repo_id": repo_id} | ({"license": license} if license else {})
    tree.pop("forced", None)
    if forced is not None:
        tree["forced"] = {"reason": forced}
    ours = (tree["adapt"] or {}).get("base")
    if ours is not None:
        ours.pop("published_as", None)
        ours.pop("revision", None)
    named = ours if ours is not None else tree["source"]
    if base is not None:
        named |= {"published_as": base[0], "revision": base[1]}
    return tree


def texts(run: Path, record: dict[str, Any], base: tuple[str, str] | None) -> dict[str, str]:
    """The files of a run that tell what is only known once it is pushed, by path."""
    told = json.loads(to_json(publishable(record)))
    before = json.loads((run / "publish" / "hftl.json").read_text(encoding="utf-8"))
    for key in ("examples", "widget"):
        if key in before:
            told[key] = before[key]
    render = render_card if record["arms"] else render_adapted
    found = {
        "record.json": to_json(record),
        "publish/README.md": render(told, place_of(told)),
        "publish/hftl.json": to_json(told),
    }
    if record["arms"]:
        files = benchmark_files(told, first_written(run))
        found |= {f"publish/{name}": text for name, text in files.items()}
    path = run / "publish" / "adapter_config.json"
    if base is not None:
        named = {"base_model_name_or_path": base[0], "revision": base[1]}
        settings = json.loads(path.read_text(encoding="utf-8")) | named
        found["publish/adapter_config.json"] = (
            json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        )
    return found


def base_texts(record: dict[str, Any], base_id: str) -> dict[str, str]:
    """The same of the adapted base."""
    told = json.loads(to_json(publishable(record)))
    return {
        "publish-base/README.md": render_adapted(told, base_id),
        "publish-base/hftl.json": to_json(told),
    }


def report_text(run: Path, amended: dict[str, str]) -> dict[str, str]:
    """The report of the amended card; as it was where the run lost what the report shows.

    Args:
        run: the run folder.
        amended: what `texts` gave.
    """
    page = report(run, json.loads(amended["publish/hftl.json"]), amended["publish/README.md"])
    return {} if page is None else {"report.html": page}
