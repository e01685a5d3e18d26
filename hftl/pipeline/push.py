"""The push of a finished run: what must hold, who we are, the base, then one commit each."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hftl.card.metadata import license_of
from hftl.config import secrets
from hftl.config.errors import explain
from hftl.config.publish import Publish
from hftl.config.recipe import Recipe
from hftl.errors import HoldError, HubError, RecipeError, RunFolderError
from hftl.measure.record import Record
from hftl.pipeline.finalize_record import amend, base_texts, report_text, texts
from hftl.publish.checks import Listing, check_card, check_files, check_proof, dry_run
from hftl.publish.http_retry import AnsweredError, patient
from hftl.publish.push import Pushed, Target, check_card_at_hub, look, push
from hftl.publish.repo_state import (
    RightsError,
    StandsError,
    account,
    check_right,
    full_id,
    pinned_base,
)
from hftl.runtime import run_folder

MESSAGE = "Publish a model with the evidence of what its transfer was worth"
BASE_MESSAGE = "Publish the adapted base of an adapter"
STAND_IN = ("owner/name", "0" * 40)
FORESIGHT = 10.0
"""Seconds that may be lost at a hub that fails, before anything trains."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What is asked of a push beyond the recipe, which decides where nothing is said."""

    repo_id: str | None = None
    public: bool = False
    request: bool = False
    force: str | None = None
    license: str | None = None

    def command(self, run: Path) -> str:
        """The command that does the push alone."""
        words = ["hftl", "publish", str(run)]
        words += ["--repo-id", self.repo_id] if self.repo_id else []
        words += ["--public"] * self.public + ["--pr"] * self.request
        words += ["--force", self.force] if self.force else []
        words += ["--license", self.license] if self.license else []
        return shlex.join(words)


def foresee(recipe: Recipe, say: Say) -> None:
    """Sees before anything trains whether the push at the end will be let in.

    Raises:
        HubError: if the token may not do it; a hub that cannot be reached now is told of only.
    """
    wanted = recipe.publish.repo_id
    if wanted is None:
        return
    try:
        with patient(FORESIGHT):
            who = account()
            full = full_id(who, wanted)
            check_right(who, full)
            if _adapts_its_base(recipe):
                check_right(who, f"{full}-base")
            look(Target(full, not recipe.publish.private))
    except (AnsweredError, RightsError, StandsError):
        raise
    except HubError as error:
        say(f"  warning: {error.what}; the push will be tried at the end")


def _adapts_its_base(recipe: Recipe) -> bool:
    """Whether the adapter would go on a base that the run makes."""
    whole = any(stage.method != "lora" for stage in recipe.stages)
    return whole and recipe.finetune.strategy == "lora"


def looked_at(run: Path, asked: Asked) -> Listing:
    """What would go and whether it may, the verdict left aside.

    Raises:
        RecipeError: if there is no base that others can have.
        RunFolderError: if the run is not finished, or a file may not leave the machine.
    """
    _sound(asked)
    if not (run / "record.json").exists():
        raise RunFolderError(f"{run} is no finished run", "Finish it with `hftl run`")
    run_folder.check_finished(run)
    record = Record.read(run).tree
    listing = dry_run(run, _words(record, asked))
    check_proof(run, record)
    for text in _cards(run, record, asked):
        check_card(text, run)
    return listing


def _sound(asked: Asked) -> None:
    """Refuses arguments that the card and the record could not tell."""
    for name, told in (("--repo-id", asked.repo_id), ("--force", asked.force)):
        if told is not None and secrets.find(told) is not None:
            raise RecipeError(f"{name} holds a secret", "Give what all may read")
    if asked.repo_id is not None:
        try:
            Publish(repo_id=asked.repo_id)
        except ValidationError as error:
            raise explain(error, "--repo-id", Publish) from error
    if asked.license == "other":
        raise RecipeError(
            "--license other has no name", "Set publish.license and publish.license_name"
        )
    if asked.license is not None:
        try:
            Publish(license=asked.license)
        except ValidationError as error:
            raise explain(error, "--license", Publish) from error
    if asked.force is not None and not asked.force.strip():
        raise RecipeError("--force is empty", "Give the reason, which the card will tell")


def warn_of_license(run: Path, options: Asked, say: Say) -> None:
    """Say where no license is stated: nobody else may then use what is published."""
    record = Record.read(run).tree
    stated = license_of(amend(record, STAND_IN[0], None, None, options.license))["license"]
    if stated is None:
        say(
            "  warning: no license is stated, so nobody else may use it; give one with --license, "
            "for instance apache-2.0, or publish.license"
        )


def refuse_hold(listing: Listing, asked: Asked) -> None:
    """Refuses what nobody should rely on.

    Raises:
        HoldError: if the verdict is hold, and no reason was given to publish nevertheless.
        RecipeError: if there is no base that others can have.
    """
    if listing.decision != "publish" and asked.force is None:
        raise HoldError(
            f"the verdict is hold: {'; '.join(listing.reasons)}",
            "Nothing was pushed. To publish nevertheless, give --force and the reason",
        )
    if listing.base is None:
        raise RecipeError(
            "the source model has no public id, so nobody could load the adapter",
            "Set source.published_as and run again",
        )


def publish(run: Path, asked: Asked, say: Say) -> None:
    """`hftl publish`: pushes a finished run, under its lock.

    Raises:
        HftlError: one of its kinds, each with an exit code.
    """
    if not (run / ".lock").exists():
        raise RunFolderError(f"{run} is no finished run", "Finish it with `hftl run`")
    with run_folder.locked(run):
        (run / "error.json").unlink(missing_ok=True)
        push_finished(run, asked, say)


def push_finished(run: Path, asked: Asked, say: Say) -> None:
    """Pushes a finished run that this process has locked.

    Raises:
        HoldError: if the verdict is hold.
        HubError: if the hub does not let it in, or fails for too long.
        RunFolderError: if something may not leave the machine.
    """
    refuse_hold(looked_at(run, asked), asked)
    warn_of_license(run, asked, say)
    wanted = asked.repo_id or Record.read(run)["recipe"]["publish"]["repo_id"]
    if wanted is None:
        raise RecipeError(
            "nobody has said where to push to", "Give --repo-id, or set publish.repo_id"
        )
    try:
        with patient():
            pushed, repo_id = _push(run, asked, wanted, say)
    except StandsError:
        raise
    except HubError as error:
        fix = f"{error.fix}. To repeat only the push: {asked.command(run)}"
        raise HubError(error.what, fix.removeprefix(". ")) from error
    _tell(pushed, repo_id, say)


def ask_hub(run: Path, options: Asked, say: Say) -> None:
    """Ask the hub all that a push asks before it writes, and write nothing.

    Without a repository, a token or a way to the hub it says what was not asked.

    Raises:
        HubError: where the push would be refused: rights, state of the repository, base, card.
    """
    from huggingface_hub import constants, get_token

    record = Record.read(run).tree
    wanted = options.repo_id or record["recipe"]["publish"]["repo_id"]
    missing = [
        "no repository is named (--repo-id)" if wanted is None else "",
        "HF_HUB_OFFLINE=1 keeps from the hub" if constants.HF_HUB_OFFLINE else "",
        "there is no token (`hf auth login`, or HF_TOKEN)" if get_token() is None else "",
    ]
    why = next(filter(None, missing), None)
    if wanted is None or why is not None:
        say(f"not asked of the hub, as {why}: rights, the repository, the base, the card")
        return
    public = options.public or not record["recipe"]["publish"]["private"]
    with patient():
        who = account()
        full = full_id(who, wanted)
        check_right(who, full, options.request)
        targets = [Target(full, public, options.request)]
        if (run / "publish-base").exists():
            check_right(who, f"{full}-base")
            targets.insert(0, Target(f"{full}-base", public))
        elif (run / "publish" / "adapter_config.json").exists():
            base, commit = pinned_base(record["source"])
            say(f"base     {base} at {commit[:8]}, which all can see")
        for text in _cards(run, record, options):
            check_card_at_hub(text)
        for target in targets:
            _say_state(target, look(target), say)


def _say_state(target: Target, info: Any, say: Say) -> None:
    """Say where a push would go, and on which commit."""
    if info is None:
        shown = "public after the commit" if target.public else "private"
        say(f"hub      {target.repo_id} would be made, {shown}")
        return
    how = "a pull request" if target.request else "one commit"
    seen = "private" if info.private else "public"
    say(f"hub      {target.repo_id} ({seen}) would get {how} on {str(info.sha)[:8]}")
    if target.public and info.private and not target.request:
        say(f"  {target.repo_id} would then be made public")


def _push(run: Path, asked: Asked, wanted: str, say: Say) -> tuple[Pushed, str]:
    """The base where there is one of our own, then the model."""
    record = Record.read(run).tree
    who = account()
    repo_id = full_id(who, wanted)
    base_id = f"{repo_id}-base"
    ours = (run / "publish-base").exists()
    check_right(who, repo_id, asked.request)
    forced = asked.force if record["verdict"]["decision"] != "publish" else None
    public = asked.public or not record["recipe"]["publish"]["private"]
    base: tuple[str, str] | None = None
    target = Target(repo_id, public, asked.request)
    if ours:
        check_right(who, base_id)
        # No base is left behind of a model that is then refused.
        look(target)
        amended = amend(record, repo_id, forced, None, asked.license)
        run_folder.amend_finished(run, base_texts(amended, base_id))
        _gates(run / "publish-base", amended, asked)
        pushed = push(run / "publish-base", Target(base_id, public), BASE_MESSAGE)
        _tell(pushed, base_id, say)
        base = (base_id, pushed.commit)
    elif (run / "publish" / "adapter_config.json").exists():
        base = pinned_base(record["source"])
    amended = amend(record, repo_id, forced, base, asked.license)
    amended_texts = texts(run, amended, base)
    run_folder.amend_finished(run, amended_texts | report_text(run, amended_texts))
    _gates(run / "publish", amended, asked)
    return push(run / "publish", target, MESSAGE), repo_id


def _cards(run: Path, record: dict[str, Any], asked: Asked) -> list[str]:
    """The cards as they will be, with ids and a commit that stand for those to come."""
    base = STAND_IN if (run / "publish" / "adapter_config.json").exists() else None
    amended = amend(record, STAND_IN[0], asked.force, base, asked.license)
    cards = [texts(run, amended, base)["publish/README.md"]]
    if (run / "publish-base").exists():
        alone = amend(record, STAND_IN[0], asked.force, None, asked.license)
        cards.append(base_texts(alone, STAND_IN[0])["publish-base/README.md"])
    return cards


def _gates(folder: Path, record: dict[str, Any], asked: Asked) -> None:
    """Once more, for what has been written since."""
    check_files(folder, _words(record, asked))
    check_card((folder / "README.md").read_text(encoding="utf-8"), folder.parent)


def _words(record: dict[str, Any], asked: Asked) -> frozenset[str]:
    """Names that the user has chosen to show: of repositories, and of labels."""
    published = record.get("published") or {}
    shown = [
        asked.repo_id, record["recipe"]["publish"]["repo_id"], published.get("repo_id"),
        record["source"]["published_as"], *(record["data"].get("labels") or []),
    ]  # fmt: skip
    return frozenset(word for text in shown if text for word in re.split(r"[^\w-]+", str(text)))


def _tell(pushed: Pushed, repo_id: str, say: Say) -> None:
    seen = "private" if pushed.private else "public"
    what = f"pushed   {pushed.url}" if pushed.new else f"{repo_id} holds the same already"
    say(f"{what} ({seen})")
    if pushed.replaces:
        say(
            f"  merged, it replaces a model that hftl did not publish: {', '.join(pushed.replaces)}"
        )
