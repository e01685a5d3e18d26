"""Say what a push would send and where, and all that is in its way; write nothing."""

from pathlib import Path
from typing import TYPE_CHECKING

from hftl.errors import HftlError
from hftl.measure.record import Record
from hftl.pipeline.push import (
    PushOptions,
    PushPreview,
    Say,
    is_public,
    list_blockers,
    render_cards,
    validate_push,
    warn_missing_license,
)
from hftl.publish.checks import (
    check_write_permission,
    complete_repo_id,
    read_account,
    resolve_public_base,
)
from hftl.publish.http_retry import retry_requests
from hftl.publish.push import PushTarget, inspect_target, validate_card_on_hub
from hftl.publish.settings_files import ADAPTER_CONFIG

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo


def dry_run_push(run: Path, options: PushOptions, say: Say) -> None:
    """Print what a push would send and where, and all that is in its way; write nothing.

    Raises:
        HftlError: the first error that the push would raise; the others are printed.
    """
    preview = validate_push(run, options)
    _print_preview(preview, say)
    record = Record.read(run)
    name = options.repo_id or record.recipe.publish.repo_id
    seen = "public" if is_public(record, options) else "private"
    say(f"to: {name}, {seen}" if name else "to: no repository is named yet (--repo-id owner/name)")
    warn_missing_license(run, options, say)
    blockers = list_blockers(preview, options)
    try:
        check_push_on_hub(run, options, say)
    except HftlError as error:
        # Without a public base the hub refuses for a reason that is listed already.
        blockers += [error] if error.what not in [blocker.what for blocker in blockers] else []
    for blocker in blockers[1:]:
        say(f"also in the way: {blocker}")
    if blockers:
        raise blockers[0]


def _print_preview(preview: PushPreview, say: Say) -> None:
    """Print the files of a push with their sizes in bytes, and the verdict."""
    if preview.base_files:
        say("first the adapted base, whose commit the adapter then names:")
    for name, size in preview.base_files:
        say(f"  {size:>12,}  publish-base/{name}")
    for name, size in preview.files:
        say(f"  {size:>12,}  {name}")
    say(f"verdict: {preview.decision}")


def check_push_on_hub(run: Path, options: PushOptions, say: Say) -> None:
    """Ask the hub all that a push asks before it writes, and write nothing.

    Without a repository, a token or a way to the hub, print what was not asked.

    Raises:
        HubError: where the push would be refused: rights, state of the repository, base, card.
    """
    from huggingface_hub import constants, get_token

    record = Record.read(run)
    name = options.repo_id or record.recipe.publish.repo_id
    missing = [
        "no repository is named (--repo-id)" if name is None else "",
        "HF_HUB_OFFLINE=1 keeps from the hub" if constants.HF_HUB_OFFLINE else "",
        "there is no token (`hf auth login`, or HF_TOKEN)" if get_token() is None else "",
    ]
    why = next(filter(None, missing), None)
    if name is None or why is not None:
        say(f"not asked of the hub, as {why}: rights, the repository, the base, the card")
        return
    public = is_public(record, options)
    with retry_requests():
        account = read_account()
        repo_id = complete_repo_id(account, name)
        check_write_permission(account, repo_id, options.pull_request)
        targets = [PushTarget(repo_id, public, options.pull_request)]
        if (run / "publish-base").exists():
            check_write_permission(account, f"{repo_id}-base")
            targets.insert(0, PushTarget(f"{repo_id}-base", public))
        elif (run / "publish" / ADAPTER_CONFIG).exists():
            base, commit = resolve_public_base(record.source)
            say(f"base     {base} at {commit[:8]}, which all can see")
        for text in render_cards(run, record, options):
            validate_card_on_hub(text)
        for target in targets:
            _print_target_state(target, inspect_target(target), say)


def _print_target_state(target: PushTarget, info: "ModelInfo | None", say: Say) -> None:
    """Print where a push would go, and on which commit."""
    if info is None:
        shown = "public after the commit" if target.public else "private"
        say(f"hub      {target.repo_id} would be made, {shown}")
        return
    how = "a pull request" if target.pull_request else "one commit"
    seen = "private" if info.private else "public"
    say(f"hub      {target.repo_id} ({seen}) would get {how} on {str(info.sha)[:8]}")
    if target.public and info.private and not target.pull_request:
        say(f"  {target.repo_id} would then be made public")
