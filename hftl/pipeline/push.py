"""Push a finished run: check it and the hub, push an adapted base if any, then the model."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from hftl.card.metadata import find_license
from hftl.config import secrets
from hftl.config.publish import Publish
from hftl.config.recipe import Recipe
from hftl.errors import HftlError, HoldError, HubError, RecipeError, RunFolderError
from hftl.measure.record import PUBLISHED_FILE, Record
from hftl.pipeline.amend import amend_record, render_adapted_base_files, render_amended_files
from hftl.pipeline.publish_folder import render_amended_report
from hftl.publish.checks import (
    TokenPermissionError,
    check_card,
    check_files,
    check_reload_recorded,
    check_write_permission,
    complete_repo_id,
    read_account,
    resolve_public_base,
)
from hftl.publish.http_retry import HubResponseError, retry_requests
from hftl.publish.push import PushResult, PushTarget, RepoStateError, inspect_target, push_folder
from hftl.publish.settings_files import ADAPTER_CONFIG
from hftl.runtime import finished_files, run_folder

MESSAGE = "Publish a model with the evidence of what its transfer was worth"
BASE_MESSAGE = "Publish the adapted base of an adapter"
PLACEHOLDER_BASE = ("owner/name", "0" * 40)
ACCESS_CHECK_SECONDS = 10.0
"""Seconds that may be lost at a hub that fails, before anything trains."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class PushOptions:
    """Hold the options of the command line, which win over the recipe."""

    repo_id: str | None = None
    public: bool = False
    pull_request: bool = False
    force: str | None = None
    license: str | None = None

    def command(self, run: Path) -> str:
        """Return the command that repeats the push alone."""
        words = ["hftl", "publish", str(run)]
        words += ["--repo-id", self.repo_id] if self.repo_id else []
        words += ["--public"] * self.public + ["--pr"] * self.pull_request
        words += ["--force", self.force] if self.force else []
        words += ["--license", self.license] if self.license else []
        return shlex.join(words)


def check_push_access(recipe: Recipe, say: Say) -> None:
    """Check before anything trains that the push at the end will be allowed.

    Raises:
        HubError: if it will not be; a hub that cannot be reached now only gives a warning.
    """
    name = recipe.publish.repo_id
    if name is None:
        return
    try:
        with retry_requests(ACCESS_CHECK_SECONDS):
            account = read_account()
            repo_id = complete_repo_id(account, name)
            check_write_permission(account, repo_id)
            if _adapts_its_base(recipe):
                check_write_permission(account, f"{repo_id}-base")
            inspect_target(PushTarget(repo_id, not recipe.publish.private))
    except (HubResponseError, TokenPermissionError, RepoStateError):
        raise
    except HubError as error:
        say(f"  warning: {error.what}; the push will be tried at the end")


def _adapts_its_base(recipe: Recipe) -> bool:
    """Return whether the adapter would go on a base that the run itself adapts."""
    changes_base = any(stage.method != "lora" for stage in recipe.stages)
    return changes_base and recipe.finetune.spec.trains_adapter


@dataclass(frozen=True)
class PushPreview:
    """Describe what a push would send: files with their sizes in bytes, and the verdict."""

    files: list[tuple[str, int]]
    base_files: list[tuple[str, int]]
    """Of a base that the run has adapted, which is pushed first."""
    decision: str
    reasons: list[str]
    base: str | None
    """What the files load on; None where nobody else can have it."""


def preview_push(run: Path, words: frozenset[str] = frozenset()) -> PushPreview:
    """Check a finished run's publish folder as a push would.

    Args:
        run: the run folder.
        words: names that the files may contain, see `sanitize.find_leak`.

    Raises:
        RunFolderError: if there is no publish folder, or a file may not leave the machine.
    """
    folder = run / "publish"
    if not (folder / PUBLISHED_FILE).exists():
        raise RunFolderError(f"{run} has no publish folder", "Finish it with `hftl run`")
    base = run / "publish-base"
    files = _list_sizes(folder, words)
    base_files = _list_sizes(base, words) if base.exists() else []
    record = Record.read_file(folder / PUBLISHED_FILE)
    verdict = record.verdict
    base_name = base.name if base_files else record.source.published_as
    if not (folder / ADAPTER_CONFIG).exists():
        base_name = "the model itself"
    return PushPreview(files, base_files, verdict.decision, verdict.reasons, base_name)


def _list_sizes(folder: Path, words: frozenset[str]) -> list[tuple[str, int]]:
    return [(name, (folder / name).stat().st_size) for name in check_files(folder, words)]


def validate_push(run: Path, options: PushOptions) -> PushPreview:
    """Return what would be pushed, after every check but those of `list_blockers`.

    Raises:
        RecipeError: if there is no base that others can have.
        RunFolderError: if the run is not finished, or a file may not leave the machine.
    """
    _check_options(options)
    if not (run / "record.json").exists():
        raise RunFolderError(f"{run} is no finished run", "Finish it with `hftl run`")
    finished_files.check_finished_files(run)
    record = Record.read(run)
    preview = preview_push(run, _list_shown_names(record, options))
    check_reload_recorded(run, record)
    for text in render_cards(run, record, options):
        check_card(text, run)
    return preview


def _check_options(options: PushOptions) -> None:
    """Refuse options that the card and the record could not show."""
    for name, value in (("--repo-id", options.repo_id), ("--force", options.force)):
        if value is not None and secrets.find_secret(value) is not None:
            raise RecipeError(f"{name} holds a secret", "Give what all may read")
    if options.repo_id is not None:
        try:
            Publish(repo_id=options.repo_id)
        except ValidationError as error:
            raise _build_option_error("--repo-id", error) from error
    if options.license == "other":
        raise RecipeError(
            "--license other has no name", "Set publish.license and publish.license_name"
        )
    if options.license is not None:
        try:
            Publish(license=options.license)
        except ValidationError as error:
            raise _build_option_error("--license", error) from error
    if options.force is not None and not options.force.strip():
        raise RecipeError("--force is empty", "Give the reason, which the card will tell")


def _build_option_error(option: str, error: ValidationError) -> RecipeError:
    """Return what the recipe's key would refuse, in the words of the command line."""
    message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
    return RecipeError(f"{option}: {message}", "Correct the option")


def warn_missing_license(run: Path, options: PushOptions, say: Say) -> None:
    """Warn where no license is stated, as nobody else may then use what is published."""
    record = Record.read(run)
    amended = amend_record(record, PLACEHOLDER_BASE[0], None, None, options.license)
    if find_license(amended)["license"] is None:
        say(
            "  warning: no license is stated, so nobody else may use it; give one with --license, "
            "for instance apache-2.0, or publish.license"
        )


def list_blockers(preview: PushPreview, options: PushOptions) -> list[HftlError]:
    """Return the errors of what nobody should rely on: a held verdict that is not forced, and an
    adapter without a base that others can have."""
    blockers: list[HftlError] = []
    if preview.decision != "publish" and options.force is None:
        hold = HoldError(
            f"the verdict is hold: {'; '.join(preview.reasons)}",
            "Nothing was pushed. To publish nevertheless, give --force and the reason",
        )
        blockers.append(hold)
    if preview.base is None:
        no_base = RecipeError(
            "the source model has no public id, so nobody could load the adapter",
            "Set source.published_as and run again",
        )
        blockers.append(no_base)
    return blockers


def is_public(record: Record, options: PushOptions) -> bool:
    """Return whether all may see what is pushed."""
    return options.public or not record.recipe.publish.private


def publish_run(run: Path, options: PushOptions, say: Say) -> None:
    """Push a finished run, under its lock (`hftl publish`).

    Raises:
        HftlError: one of its kinds, each with an exit code.
    """
    if not (run / ".lock").exists():
        raise RunFolderError(f"{run} is no finished run", "Finish it with `hftl run`")
    with run_folder.lock_run(run):
        (run / "error.json").unlink(missing_ok=True)
        push_finished_run(run, options, say)


def push_finished_run(run: Path, options: PushOptions, say: Say) -> None:
    """Push a finished run that this process has locked.

    Raises:
        HoldError: if the verdict is hold.
        HubError: if the hub refuses it, or fails for too long.
        RunFolderError: if something may not leave the machine.
    """
    for blocker in list_blockers(validate_push(run, options), options):
        raise blocker
    warn_missing_license(run, options, say)
    name = options.repo_id or Record.read(run).recipe.publish.repo_id
    if name is None:
        raise RecipeError(
            "nobody has said where to push to", "Give --repo-id, or set publish.repo_id"
        )
    try:
        with retry_requests():
            pushed, repo_id = _push_folders(run, options, name, say)
    except RepoStateError:
        raise
    except HubError as error:
        fix = f"{error.fix}. To repeat only the push: {options.command(run)}"
        raise HubError(error.what, fix.removeprefix(". ")) from error
    _print_push(pushed, repo_id, say)


def _push_folders(run: Path, options: PushOptions, name: str, say: Say) -> tuple[PushResult, str]:
    """Push the base where the run has adapted one, then the model."""
    record = Record.read(run)
    account = read_account()
    repo_id = complete_repo_id(account, name)
    base_id = f"{repo_id}-base"
    has_own_base = (run / "publish-base").exists()
    check_write_permission(account, repo_id, options.pull_request)
    forced = options.force if record.verdict.decision != "publish" else None
    public = is_public(record, options)
    base: tuple[str, str] | None = None
    target = PushTarget(repo_id, public, options.pull_request)
    if has_own_base:
        check_write_permission(account, base_id)
        # A model that is refused must leave no base behind.
        inspect_target(target)
        amended = amend_record(record, repo_id, forced, None, options.license)
        finished_files.rewrite_finished_files(run, render_adapted_base_files(amended, base_id))
        _check_folder(run / "publish-base", amended, options)
        pushed = push_folder(run / "publish-base", PushTarget(base_id, public), BASE_MESSAGE)
        _print_push(pushed, base_id, say)
        base = (base_id, pushed.commit)
    elif (run / "publish" / ADAPTER_CONFIG).exists():
        base = resolve_public_base(record.source)
    amended = amend_record(record, repo_id, forced, base, options.license)
    amended_texts = render_amended_files(run, amended, base)
    finished_files.rewrite_finished_files(
        run, amended_texts | render_amended_report(run, amended_texts)
    )
    _check_folder(run / "publish", amended, options)
    return push_folder(run / "publish", target, MESSAGE), repo_id


def render_cards(run: Path, record: Record, options: PushOptions) -> list[str]:
    """Render the cards as they will be, with placeholders for ids and commit."""
    base = PLACEHOLDER_BASE if (run / "publish" / ADAPTER_CONFIG).exists() else None
    amended = amend_record(record, PLACEHOLDER_BASE[0], options.force, base, options.license)
    cards = [render_amended_files(run, amended, base)["publish/README.md"]]
    if (run / "publish-base").exists():
        alone = amend_record(record, PLACEHOLDER_BASE[0], options.force, None, options.license)
        cards.append(
            render_adapted_base_files(alone, PLACEHOLDER_BASE[0])["publish-base/README.md"]
        )
    return cards


def _check_folder(folder: Path, record: Record, options: PushOptions) -> None:
    """Check files and card again, as the amended ones were written since."""
    check_files(folder, _list_shown_names(record, options))
    check_card((folder / "README.md").read_text(encoding="utf-8"), folder.parent)


def _list_shown_names(record: Record, options: PushOptions) -> frozenset[str]:
    """Return the names that the user has chosen to show: of repositories and of labels."""
    shown = [
        options.repo_id, record.recipe.publish.repo_id,
        record.published and record.published.repo_id,
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
