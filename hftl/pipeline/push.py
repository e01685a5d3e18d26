"""The push of a finished run: what must hold, who we are, the base, then one commit each."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hftl.card.metadata import find_license
from hftl.config import secrets
from hftl.config.errors import build_recipe_error
from hftl.config.publish import Publish
from hftl.config.recipe import Recipe
from hftl.errors import HoldError, HubError, RecipeError, RunFolderError
from hftl.measure.record import Record
from hftl.pipeline.finalize_record import (
    amend_record,
    render_amended_files,
    render_amended_report,
    render_base_files,
)
from hftl.publish.checks import (
    PushPreview,
    check_card,
    check_files,
    check_reload_proof,
    preview_push,
)
from hftl.publish.http_retry import HubResponseError, retry_requests
from hftl.publish.push import (
    PushResult,
    PushTarget,
    inspect_target,
    push_folder,
    validate_card_on_hub,
)
from hftl.publish.repo_state import (
    RepoStateError,
    TokenPermissionError,
    check_write_permission,
    complete_repo_id,
    read_account,
    resolve_public_base,
)
from hftl.runtime import run_folder

MESSAGE = "Publish a model with the evidence of what its transfer was worth"
BASE_MESSAGE = "Publish the adapted base of an adapter"
PLACEHOLDER_BASE = ("owner/name", "0" * 40)
ACCESS_CHECK_SECONDS = 10.0
"""Seconds that may be lost at a hub that fails, before anything trains."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class PushOptions:
    """What is asked of a push beyond the recipe, which decides where nothing is said."""

    repo_id: str | None = None
    public: bool = False
    pull_request: bool = False
    force: str | None = None
    license: str | None = None

    def command(self, run: Path) -> str:
        """The command that does the push alone."""
        words = ["hftl", "publish", str(run)]
        words += ["--repo-id", self.repo_id] if self.repo_id else []
        words += ["--public"] * self.public + ["--pr"] * self.pull_request
        words += ["--force", self.force] if self.force else []
        words += ["--license", self.license] if self.license else []
        return shlex.join(words)


def check_push_access(recipe: Recipe, say: Say) -> None:
    """Sees before anything trains whether the push at the end will be let in.

    Raises:
        HubError: if the token may not do it; a hub that cannot be reached now is told of only.
    """
    wanted = recipe.publish.repo_id
    if wanted is None:
        return
    try:
        with retry_requests(ACCESS_CHECK_SECONDS):
            who = read_account()
            full = complete_repo_id(who, wanted)
            check_write_permission(who, full)
            if _adapts_its_base(recipe):
                check_write_permission(who, f"{full}-base")
            inspect_target(PushTarget(full, not recipe.publish.private))
    except (HubResponseError, TokenPermissionError, RepoStateError):
        raise
    except HubError as error:
        say(f"  warning: {error.what}; the push will be tried at the end")


def _adapts_its_base(recipe: Recipe) -> bool:
    """Whether the adapter would go on a base that the run makes."""
    whole = any(stage.method != "lora" for stage in recipe.stages)
    return whole and recipe.finetune.spec.publishes_adapter


def validate_push(run: Path, asked: PushOptions) -> PushPreview:
    """What would go and whether it may, the verdict left aside.

    Raises:
        RecipeError: if there is no base that others can have.
        RunFolderError: if the run is not finished, or a file may not leave the machine.
    """
    _check_options(asked)
    if not (run / "record.json").exists():
        raise RunFolderError(f"{run} is no finished run", "Finish it with `hftl run`")
    run_folder.check_finished_files(run)
    record = Record.read(run)
    listing = preview_push(run, _list_shown_names(record, asked))
    check_reload_proof(run, record)
    for text in _render_cards(run, record, asked):
        check_card(text, run)
    return listing


def _check_options(asked: PushOptions) -> None:
    """Refuses arguments that the card and the record could not tell."""
    for name, told in (("--repo-id", asked.repo_id), ("--force", asked.force)):
        if told is not None and secrets.find_secret(told) is not None:
            raise RecipeError(f"{name} holds a secret", "Give what all may read")
    if asked.repo_id is not None:
        try:
            Publish(repo_id=asked.repo_id)
        except ValidationError as error:
            raise build_recipe_error(error, "--repo-id", Publish) from error
    if asked.license == "other":
        raise RecipeError(
            "--license other has no name", "Set publish.license and publish.license_name"
        )
    if asked.license is not None:
        try:
            Publish(license=asked.license)
        except ValidationError as error:
            raise build_recipe_error(error, "--license", Publish) from error
    if asked.force is not None and not asked.force.strip():
        raise RecipeError("--force is empty", "Give the reason, which the card will tell")


def warn_missing_license(run: Path, options: PushOptions, say: Say) -> None:
    """Say where no license is stated: nobody else may then use what is published."""
    record = Record.read(run)
    stated = find_license(amend_record(record, PLACEHOLDER_BASE[0], None, None, options.license))[
        "license"
    ]
    if stated is None:
        say(
            "  warning: no license is stated, so nobody else may use it; give one with --license, "
            "for instance apache-2.0, or publish.license"
        )


def check_verdict(listing: PushPreview, asked: PushOptions) -> None:
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


def publish_run(run: Path, asked: PushOptions, say: Say) -> None:
    """`hftl publish`: pushes a finished run, under its lock.

    Raises:
        HftlError: one of its kinds, each with an exit code.
    """
    if not (run / ".lock").exists():
        raise RunFolderError(f"{run} is no finished run", "Finish it with `hftl run`")
    with run_folder.lock_run(run):
        (run / "error.json").unlink(missing_ok=True)
        push_finished_run(run, asked, say)


def push_finished_run(run: Path, asked: PushOptions, say: Say) -> None:
    """Pushes a finished run that this process has locked.

    Raises:
        HoldError: if the verdict is hold.
        HubError: if the hub does not let it in, or fails for too long.
        RunFolderError: if something may not leave the machine.
    """
    check_verdict(validate_push(run, asked), asked)
    warn_missing_license(run, asked, say)
    wanted = asked.repo_id or Record.read(run).recipe.publish.repo_id
    if wanted is None:
        raise RecipeError(
            "nobody has said where to push to", "Give --repo-id, or set publish.repo_id"
        )
    try:
        with retry_requests():
            pushed, repo_id = _push_folders(run, asked, wanted, say)
    except RepoStateError:
        raise
    except HubError as error:
        fix = f"{error.fix}. To repeat only the push: {asked.command(run)}"
        raise HubError(error.what, fix.removeprefix(". ")) from error
    _print_push(pushed, repo_id, say)


def check_push_on_hub(run: Path, options: PushOptions, say: Say) -> None:
    """Ask the hub all that a push asks before it writes, and write nothing.

    Without a repository, a token or a way to the hub it says what was not asked.

    Raises:
        HubError: where the push would be refused: rights, state of the repository, base, card.
    """
    from huggingface_hub import constants, get_token

    record = Record.read(run)
    wanted = options.repo_id or record.recipe.publish.repo_id
    missing = [
        "no repository is named (--repo-id)" if wanted is None else "",
        "HF_HUB_OFFLINE=1 keeps from the hub" if constants.HF_HUB_OFFLINE else "",
        "there is no token (`hf auth login`, or HF_TOKEN)" if get_token() is None else "",
    ]
    why = next(filter(None, missing), None)
    if wanted is None or why is not None:
        say(f"not asked of the hub, as {why}: rights, the repository, the base, the card")
        return
    public = options.public or not record.recipe.publish.private
    with retry_requests():
        who = read_account()
        full = complete_repo_id(who, wanted)
        check_write_permission(who, full, options.pull_request)
        targets = [PushTarget(full, public, options.pull_request)]
        if (run / "publish-base").exists():
            check_write_permission(who, f"{full}-base")
            targets.insert(0, PushTarget(f"{full}-base", public))
        elif (run / "publish" / "adapter_config.json").exists():
            base, commit = resolve_public_base(record.source)
            say(f"base     {base} at {commit[:8]}, which all can see")
        for text in _render_cards(run, record, options):
            validate_card_on_hub(text)
        for target in targets:
            _print_target_state(target, inspect_target(target), say)


def _print_target_state(target: PushTarget, info: Any, say: Say) -> None:
    """Say where a push would go, and on which commit."""
    if info is None:
        shown = "public after the commit" if target.public else "private"
        say(f"hub      {target.repo_id} would be made, {shown}")
        return
    how = "a pull request" if target.pull_request else "one commit"
    seen = "private" if info.private else "public"
    say(f"hub      {target.repo_id} ({seen}) would get {how} on {str(info.sha)[:8]}")
    if target.public and info.private and not target.pull_request:
        say(f"  {target.repo_id} would then be made public")


def _push_folders(run: Path, asked: PushOptions, wanted: str, say: Say) -> tuple[PushResult, str]:
    """The base where there is one of our own, then the model."""
    record = Record.read(run)
    who = read_account()
    repo_id = complete_repo_id(who, wanted)
    base_id = f"{repo_id}-base"
    ours = (run / "publish-base").exists()
    check_write_permission(who, repo_id, asked.pull_request)
    forced = asked.force if record.verdict.decision != "publish" else None
    public = asked.public or not record.recipe.publish.private
    base: tuple[str, str] | None = None
    target = PushTarget(repo_id, public, asked.pull_request)
    if ours:
        check_write_permission(who, base_id)
        # No base is left behind of a model that is then refused.
        inspect_target(target)
        amended = amend_record(record, repo_id, forced, None, asked.license)
        run_folder.rewrite_finished_files(run, render_base_files(amended, base_id))
        _check_folder(run / "publish-base", amended, asked)
        pushed = push_folder(run / "publish-base", PushTarget(base_id, public), BASE_MESSAGE)
        _print_push(pushed, base_id, say)
        base = (base_id, pushed.commit)
    elif (run / "publish" / "adapter_config.json").exists():
        base = resolve_public_base(record.source)
    amended = amend_record(record, repo_id, forced, base, asked.license)
    amended_texts = render_amended_files(run, amended, base)
    run_folder.rewrite_finished_files(
        run, amended_texts | render_amended_report(run, amended_texts)
    )
    _check_folder(run / "publish", amended, asked)
    return push_folder(run / "publish", target, MESSAGE), repo_id


def _render_cards(run: Path, record: Record, asked: PushOptions) -> list[str]:
    """The cards as they will be, with ids and a commit that stand for those to come."""
    base = PLACEHOLDER_BASE if (run / "publish" / "adapter_config.json").exists() else None
    amended = amend_record(record, PLACEHOLDER_BASE[0], asked.force, base, asked.license)
    cards = [render_amended_files(run, amended, base)["publish/README.md"]]
    if (run / "publish-base").exists():
        alone = amend_record(record, PLACEHOLDER_BASE[0], asked.force, None, asked.license)
        cards.append(render_base_files(alone, PLACEHOLDER_BASE[0])["publish-base/README.md"])
    return cards


def _check_folder(folder: Path, record: Record, asked: PushOptions) -> None:
    """Once more, for what has been written since."""
    check_files(folder, _list_shown_names(record, asked))
    check_card((folder / "README.md").read_text(encoding="utf-8"), folder.parent)


def _list_shown_names(record: Record, asked: PushOptions) -> frozenset[str]:
    """Names that the user has chosen to show: of repositories, and of labels."""
    shown = [
        asked.repo_id, record.recipe.publish.repo_id, record.published and record.published.repo_id,
        record.source.published_as, *record.data.labels,
    ]  # fmt: skip
    return frozenset(word for text in shown if text for word in re.split(r"[^\w-]+", str(text)))


def _print_push(pushed: PushResult, repo_id: str, say: Say) -> None:
    seen = "private" if pushed.private else "public"
    what = f"pushed   {pushed.url}" if pushed.is_new else f"{repo_id} holds the same already"
    say(f"{what} ({seen})")
    if pushed.replaces:
        say(
            f"  merged, it replaces a model that hftl did not publish: {', '.join(pushed.replaces)}"
        )
