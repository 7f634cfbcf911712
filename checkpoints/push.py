"""Files to the Hub as one commit, so that a branch has all of them or is what it was."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoints.hub import ANSWER_S, LOG_IN, because, hashes
from checkpoints.manifest import CARD_FILE, AdapterError, one_sentence

_SILENCE_S = 120.0  # the client itself would wait for ever


@dataclass(frozen=True)
class Pushed:
    """What became of the files.

    Attributes:
        commit: the branch's head now.
        branch: where they are.
        url: of the page that shows them.
        changed: False if the branch had just these files, so that there was nothing to commit.
        notes: what else was done, one clause each.
    """

    commit: str
    branch: str
    url: str
    changed: bool
    notes: tuple[str, ...]


def push(
    repo: str,
    files: Mapping[str, bytes],
    *,
    branch: str | None = None,
    private: bool = False,
    stale: Collection[str] = (),
    message: str,
) -> Pushed:
    """Send files to a model repository as one commit.

    Requests that can be repeated are, as often and as slowly as huggingface_hub does it (5 times, or as long as the
    server asks for); the commit itself is sent once.

    Args:
        repo: made if there is none.
        files: by name, the card among them.
        branch: made from the head of main if there is none, and removed again if the commit fails; None is main.
        private: of a new repository; an existing one must be private already.
        stale: names that leave the branch unless they are among the files; what else is there stays.
        message: of the commit.
    Raises:
        AdapterError: why the branch is what it was, what was left on the server, what to do.
    """
    from huggingface_hub import HfApi, constants, get_session, get_token

    get_session().timeout = _SILENCE_S
    job = _Push(HfApi(), repo, files, branch or constants.DEFAULT_REVISION)
    try:
        if get_token() is None:
            raise AdapterError(f"nobody is logged in; {LOG_IN}")
        _validate_card(files[CARD_FILE].decode())
        job.make_repository(private)
        job.make_branch()
        changed = job.compare(stale)
        commit = job.commit(message) if changed else job.parent
    except (Exception, KeyboardInterrupt) as error:
        changed, commit = True, job.arrived() if job.ready else None
        if commit is None:
            reason = str(error) if isinstance(error, AdapterError) else because(error, repo)
            raise AdapterError(
                "; ".join([f"{repo} was not published: {reason}", *job.all_notes(done=False)])
            ) from error
    url = f"{constants.ENDPOINT}/{repo}/tree/{job.branch}"
    return Pushed(str(commit), job.branch, url, changed, tuple(job.all_notes(done=True)))


def _validate_card(text: str) -> None:
    """Ask the server about the card before anything is made there."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import HfHubHTTPError

    try:
        ModelCard(text).validate()
    except ValueError as error:
        if isinstance(error, HfHubHTTPError):
            raise
        said = _card_problems(str(error))
        raise AdapterError(f"the server refuses the card ({said}); another license= may help") from error


def _card_problems(answer: str) -> str:
    """The messages of the server's answer, which is text or JSON as it sees fit."""
    try:
        return "; ".join(one_sentence(problem["message"]) for problem in json.loads(answer)["errors"])
    except (ValueError, KeyError, TypeError):
        return one_sentence(answer)


@dataclass
class _Push:
    api: Any
    repo: str
    files: Mapping[str, bytes]
    branch: str
    parent: str | None = None  # the branch's head before; None in a repository without any commit
    made_branch: bool = False
    ready: bool = False  # for the commit
    gone: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def make_repository(self, private: bool) -> None:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            is_private = self.api.model_info(self.repo).private
        except RepositoryNotFoundError:
            self.api.create_repo(self.repo, private=private)
            self.notes.append(f"the {'private' if private else 'public'} repository was created")
            return
        if private and not is_private:
            raise AdapterError("it exists and is public; make it private in its settings, or leave private=true out")

    def make_branch(self) -> None:
        refs = self.api.list_repo_refs(self.repo)
        if self.branch in {ref.name for ref in refs.tags}:
            raise AdapterError(f"revision={self.branch} is a tag, which stays where it is; name a branch")
        heads = {ref.name: str(ref.target_commit) for ref in refs.branches}
        if self.branch not in heads and heads:
            self.api.create_branch(self.repo, branch=self.branch)
            self.made_branch = True
            heads[self.branch] = self.head()
        self.parent, self.ready = heads.get(self.branch), True

    def head(self) -> str:
        return str(self.api.model_info(self.repo, revision=self.branch, timeout=ANSWER_S).sha)

    def compare(self, stale: Collection[str]) -> bool:
        """Is there anything to commit?"""
        there = self.listing(self.parent)
        self.gone = sorted((set(stale) - self.files.keys()) & there.keys())
        return not self.holds(there)

    def listing(self, commit: str | None) -> dict[str, str]:
        """Hash by name of the files at a commit."""
        entries = self.api.list_repo_tree(self.repo, revision=commit) if commit else []
        return {e.path: e.lfs.sha256 if e.lfs else e.blob_id for e in entries if hasattr(e, "blob_id")}

    def holds(self, there: Mapping[str, str]) -> bool:
        same = all(there.get(name) in hashes(content) for name, content in self.files.items())
        return same and not there.keys() & set(self.gone)

    def commit(self, message: str) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = [CommitOperationAdd(name, content) for name, content in self.files.items()]
        operations = [*additions, *map(CommitOperationDelete, self.gone)]
        to = {"repo_id": self.repo, "revision": self.branch}
        # An ignore file in the repository would silently leave out what it names; the empty one does not.
        self.api.preupload_lfs_files(additions=additions, gitignore_content="", free_memory=False, **to)
        made = self.api.create_commit(operations=operations, commit_message=message, parent_commit=self.parent, **to)
        return str(made.oid)

    def arrived(self) -> str | None:
        """The commit, if it took place although its answer was lost; else a branch that was made for it is removed."""
        try:
            head = self.head()
            if head == self.parent and self.made_branch:
                self.api.delete_branch(self.repo, branch=self.branch)
                self.made_branch = False
            elif head == self.parent:
                self.notes.append(f"{self.branch} is what it was")
            elif self.holds(self.listing(head)):
                self.notes.append("the connection was lost after the commit, which did take place")
                return head
        except Exception:
            self.notes.append("the server does not say whether it arrived all the same; repeating the command is safe")
        return None

    def all_notes(self, done: bool) -> list[str]:
        """In words, what else is on the server now."""
        made = [f"the branch {self.branch} was created from main"] if self.made_branch else []
        removed = [f"{', '.join(self.gone)} of an earlier publication was removed"] if done and self.gone else []
        return [*self.notes, *made, *removed]
