"""Check what a push needs: files, card and reload proof here, rights and base at the hub.

A check of one file is a function that returns the problem and what to do about it, and a line in
`FILE_CHECKS`.
"""

import json
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from hftl.card.validation import validate_card
from hftl.errors import HftlError, HubError, RecipeError, RunFolderError
from hftl.measure.record import Record, SourceFacts
from hftl.measure.verdict import RELOAD_TOLERANCE
from hftl.models.weight_files import hash_checkpoint
from hftl.publish.http_retry import HubResponseError, wrap_hub_errors
from hftl.publish.reload_process import WaitingReload, run_reload_check
from hftl.publish.sanitize import find_leak
from hftl.runtime import paths, run_folder

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

ALLOWED_FILES = {
    "README.md", "hftl.json", "every_eval_ever.json", "config.json", "adapter_config.json",
    "adapter_model.safetensors", "model.safetensors", "head.safetensors",
    "tokenizer.json", "tokenizer_config.json",
    "vocab.txt", "merges.txt", "vocab.json", "special_tokens_map.json", "added_tokens.json",
    "sentencepiece.bpe.model", "spiece.model", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "chat_template.jinja", "chat_template.json",
}  # fmt: skip
SHARD_FILES = re.compile(r"model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json")
EVAL_RESULT_FILES = re.compile(r"\.eval_results/hftl-\w[\w.-]*\.yaml")
PLOT_FILES = re.compile(r"assets/[\w-]+\.png")


def is_publishable(name: str) -> bool:
    """Return whether a file of this path is one that hftl publishes."""
    return bool(
        name in ALLOWED_FILES
        or SHARD_FILES.fullmatch(name)
        or PLOT_FILES.fullmatch(name)
        or EVAL_RESULT_FILES.fullmatch(name)
    )


def measure_reload_difference(
    folder: Path, base: Path, sample: Path, device: str, waiting: WaitingReload | None = None
) -> float:
    """Return the largest difference of logits after a fresh process loads the folder without hftl.

    It is relative to the largest logit where that is above 1, as fp32 cannot promise more.

    Args:
        folder: the published one.
        base: the folder of an adapter's base.
        sample: the file that `write_reload_sample` wrote.
        device: where the model runs.
        waiting: the fresh process, where one was prepared.

    Raises:
        HftlError: if the fresh process fails; that is a bug.
    """
    process = run_reload_check([str(folder), str(base), str(sample), device], waiting)
    if process.returncode != 0:
        raise HftlError(
            f"the publish folder does not load in a fresh process: {process.stderr.strip()[-800:]}",
            "Report this with log.txt",
        )
    comparison = json.loads(process.stdout.strip().splitlines()[-1])
    if comparison["hftl_imported"]:
        raise HftlError("the fresh process imported hftl", "Report this with log.txt")
    return comparison["difference"] / max(1.0, comparison["largest"])


Problem = tuple[str, str]
FileCheck = Callable[[Path, str, frozenset[str]], Problem | None]


def check_link(path: Path, name: str, words: frozenset[str]) -> Problem | None:
    """Refuse a link: the file that it leads to would be pushed."""
    return ("is a link, and what it leads to would go", "Remove it") if path.is_symlink() else None


def check_name(path: Path, name: str, words: frozenset[str]) -> Problem | None:
    """Refuse a file that is not on the allow-list."""
    if is_publishable(name):
        return None
    return "is not among the files that may be published", "Remove it"


def check_leak(path: Path, name: str, words: frozenset[str]) -> Problem | None:
    """Refuse a file with a secret, a local path, or a name of the user or the machine."""
    leak = find_leak(path, name, words)
    fix = "Give source.model as a hub id or package:, data paths relative, and no secrets"
    return None if leak is None else (f"names {leak}", fix)


FILE_CHECKS: tuple[FileCheck, ...] = (check_link, check_name, check_leak)


def check_files(folder: Path, words: frozenset[str] = frozenset()) -> list[str]:
    """Return the files that would be pushed, by their path in the folder.

    Args:
        folder: a publish folder.
        words: names that the files may contain, see `sanitize.find_leak`.

    Raises:
        RunFolderError: naming the first file that may not leave the machine, and why.
    """
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    for name in files:
        for check in FILE_CHECKS:
            problem = check(folder / name, name, words)
            if problem is not None:
                raise RunFolderError(f"{folder / name} {problem[0]}", problem[1])
    return files


def check_card(text: str, run: Path) -> None:
    """Check a card as the hub will.

    Args:
        text: the whole README.md.
        run: the run whose card it is.

    Raises:
        RunFolderError: naming the first problem.
    """
    problems = validate_card(text)
    if problems:
        raise RunFolderError(
            f"the card of {run} cannot be published: {problems[0]}",
            f"Write it again: hftl card {run}",
        )


def check_reload_recorded(run: Path, record: Record) -> None:
    """Check that the published weights were proved to reload, and are those that were proved.

    An encoder without a task has no proof, as it has no logits to compare.

    Raises:
        RunFolderError: if there is no proof, it failed, or the files are other ones.
    """
    if not record.arms:
        return
    again = "Run the same `hftl run` again"
    package = run / "phases" / "package"
    difference = record.reload_difference
    if (
        run_folder.read_stage_inputs(package) is None
        or difference is None
        or difference > RELOAD_TOLERANCE
    ):
        raise RunFolderError(
            f"{run} has no proof that its model reloads to the same outputs", again
        )
    for name in ("model", "base"):
        for proved in sorted((package / name).glob("*.safetensors")):
            folder = run / ("publish" if name == "model" else "publish-base")
            here = folder / proved.name
            if not here.exists() or run_folder.hash_file(here) != run_folder.hash_file(proved):
                raise RunFolderError(f"{here} is not the file whose reload was proved", again)


class _HubAnswer(BaseModel):
    """Describe a part of the hub's answer; keys that are not listed are ignored."""

    model_config = ConfigDict(alias_generator=to_camel, frozen=True)


class Organization(_HubAnswer):
    """Describe an organisation, and the role that the user has in it."""

    name: str
    role_in_org: str | None = None


class Entity(_HubAnswer):
    """Name the owner or the repository that a scope is of."""

    name: str | None = None


class Scope(_HubAnswer):
    """Describe what a fine-grained token may do there."""

    entity: Entity | None = None
    permissions: list[str] | None = None


class FineGrained(_HubAnswer):
    """Describe what a fine-grained token may do everywhere, and in its scopes."""

    global_: list[str] | None = Field(default=None, alias="global")
    scoped: list[Scope] | None = None


class Token(_HubAnswer):
    """Describe an access token; a hub of one's own may say nothing of it."""

    role: str = "write"
    fine_grained: FineGrained | None = None


class Authentication(_HubAnswer):
    """Hold the token."""

    access_token: Token | None = None


class Account(_HubAnswer):
    """Describe the user of our token, as the hub's whoami answers."""

    name: str
    orgs: list[Organization] = []
    auth: Authentication | None = None

    @property
    def token(self) -> Token:
        """Return the token; one that may write where the hub says nothing of it."""
        return (self.auth and self.auth.access_token) or Token()


READ_ONLY_ROLES = ("read", "no_access")
"""Roles in an organisation that may not write."""


class TokenPermissionError(HubError):
    """There is no token, or it may not do what was asked for."""


def read_account() -> Account:
    """Return the user of our token, which comes from the environment or `hf auth login`.

    Raises:
        HubError: if there is no token, or the hub does not know it.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise TokenPermissionError(
            "pushing needs a token, and there is none",
            "Log in with `hf auth login`, or set HF_TOKEN",
        )
    with wrap_hub_errors("asking the hub who we are"):
        return Account.model_validate(HfApi().whoami())


def complete_repo_id(account: Account, repo_id: str) -> str:
    """Return `owner/name`; a name without an owner is the user's own."""
    return repo_id if "/" in repo_id else f"{account.name}/{repo_id}"


def check_write_permission(account: Account, repo_id: str, pull_request: bool = False) -> None:
    """Refuse a push that the token may not do.

    Args:
        account: from `read_account`.
        repo_id: `owner/name`.
        pull_request: whether a pull request is to be opened, which needs less.

    Raises:
        TokenPermissionError: saying what the token lacks.
    """
    missing = find_missing_permission(account, repo_id, pull_request)
    if missing is not None:
        raise TokenPermissionError(
            f"{repo_id}: {missing}",
            "Use a token that may write there: https://huggingface.co/settings/tokens",
        )


def find_missing_permission(account: Account, repo_id: str, pull_request: bool) -> str | None:
    """Return what the token lacks; None where the hub's answer shows no lack.

    Args:
        account: from `read_account`.
        repo_id: `owner/name`.
        pull_request: whether a pull request is to be opened.
    """
    owner = repo_id.split("/")[0]
    token = account.token
    if token.role == "read":
        return f"the token of {account.name} is read-only"
    if token.role == "fineGrained":
        return _find_missing_scope(token.fine_grained or FineGrained(), repo_id, pull_request)
    if pull_request or owner == account.name:
        return None
    roles = {org.name: org.role_in_org for org in account.orgs}
    if owner not in roles:
        return f"{account.name} is not {owner}, and no member of an organisation of that name"
    if roles[owner] in READ_ONLY_ROLES:
        return f"{account.name} may only read in the organisation {owner}"
    return None


def _find_missing_scope(token: FineGrained, repo_id: str, pull_request: bool) -> str | None:
    """Return what a fine-grained token lacks for a repository or its owner."""
    sufficient = {"repo.write"} | ({"discussion.write"} if pull_request else set())
    if pull_request and sufficient & set(token.global_ or []):
        return None
    for scope in token.scoped or []:
        name = scope.entity.name if scope.entity else None
        is_for_repo = name in (repo_id, repo_id.split("/")[0])
        if is_for_repo and sufficient & set(scope.permissions or []):
            return None
    return f"the fine-grained token lacks {' or '.join(sorted(sufficient))}"


WEIGHT_FILES = "model*.safetensors"


def resolve_public_base(source: SourceFacts) -> tuple[str, str]:
    """Return the base's public id and its commit, after checking both at the hub.

    Args:
        source: the record's section.

    Raises:
        RecipeError: if the source model has no public id.
        HubError: if it is not public, the commit is unknown, or its weights differ.
    """
    base = source.published_as
    if base is None:
        raise RecipeError(
            "the source model has no public id, so nobody could load the adapter",
            "Set source.published_as and run again",
        )
    info = _read_public_info(base, source.revision)
    hub_hashes = {
        file.rfilename: file.lfs.sha256
        for file in info.siblings or []
        if file.lfs is not None and fnmatch(file.rfilename, WEIGHT_FILES)
    }
    # A source that was fetched from that commit needs no comparison.
    if source.model != base and hub_hashes != _hash_local_weights(source):
        _compare_tensors(base, str(info.sha), source.weights_sha256)
    return base, str(info.sha)


def _read_public_info(base: str, revision: str | None) -> "ModelInfo":
    """Return what the hub says of the base to somebody without a token."""
    from huggingface_hub import HfApi

    at = base if revision is None else f"{base} at {revision}"
    try:
        with wrap_hub_errors(f"reading the base {at}"):
            return HfApi().model_info(base, revision=revision, files_metadata=True, token=False)
    except HubResponseError as error:
        if error.status not in (401, 403, 404):
            raise
        raise HubError(
            f"the base {at} is not public on the hub, so nobody could load the adapter",
            "Correct source.published_as and source.revision, or publish the base first",
        ) from error


def _hash_local_weights(source: SourceFacts) -> dict[str, str]:
    """Return the hashes of the weight files that were trained on; none where they are gone."""
    folder = paths.resolve_local_path(source.model, "source.model")
    files = [] if folder is None else folder.glob(WEIGHT_FILES)
    return {path.name: run_folder.hash_file(path) for path in files}


def _compare_tensors(base: str, revision: str, expected: str) -> None:
    """Fetch the hub's weights and compare the tensors, which differing files may share.

    Raises:
        HubError: if the tensors differ.
    """
    from huggingface_hub import snapshot_download

    with wrap_hub_errors(f"fetching the weights of the base {base}"):
        folder = snapshot_download(
            base,
            revision=revision,
            allow_patterns=[WEIGHT_FILES, "pytorch_model*.bin"],
            token=False,
        )
    if hash_checkpoint(Path(folder)) != expected:
        raise HubError(
            f"the base {base} at {revision[:8]} has other weights on the hub than the adapter was "
            "trained on",
            "Correct source.published_as and source.revision",
        )
