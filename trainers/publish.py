"""`python -m trainers.publish adapter=<dir> repo=<ns/name>`: send an adapter with its card and report to the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trainers.config import PublishConfig
from trainers.recipes import exit_on_error, plain_command

if TYPE_CHECKING:
    from checkpoints.card import License
    from checkpoints.manifest import Manifest

USAGE = """usage: python -m trainers.publish adapter=<folder> repo=<namespace/name> [key=value ...]

Checks the adapter and that its report is its own, writes a card with licence, backbone and measurements, and sends
all of it as one commit.  Log in first with `hf auth login`, or set HF_TOKEN.  --print shows the resolved settings and
exits."""

_EMBEDDED = Path(__file__).resolve().parents[1] / "data" / "embedded"
_REPORTS = ("report.json", "report.md", "report.png")
_RECIPE = "config.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """The command.  Exit codes: 0 done, 1 refused here or by the Hub, 2 wrong settings."""
    config = plain_command(PublishConfig, sys.argv[1:] if argv is None else argv, USAGE)
    if config is None:
        return 0
    try:
        run(config)
    except (ValueError, OSError) as error:  # AdapterError, a file that cannot be read
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def run(config: PublishConfig) -> None:
    """Check, show what is sent, and send it.

    Raises:
        AdapterError: the adapter, its report or the Hub's answer; what is on the Hub is then what was there before.
    """
    _choose_transfer()
    from checkpoints.card import Place, card
    from checkpoints.manifest import CARD_FILE, AdapterError, find_adapter
    from checkpoints.push import push
    from trainers.verdict import verdict_text

    folder = find_adapter(config.adapter)
    manifest, files = read_adapter(folder)
    measured = _present(folder, _REPORTS)
    report = own_report(folder, manifest, files | measured, unmeasured=config.unmeasured)
    files |= measured if report else {}
    if (folder.parent / "provenance.json").is_file():
        files |= _present(folder.parent, [_RECIPE])
    terms = _license(manifest, config.license)
    place = Place(config.repo, terms, config.revision, plot="report.png" in files)
    try:
        text = card(manifest, report, verdict_text(report["verdict"]) if report else "", place)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(
            f"{folder / 'report.json'} is damaged ({error!r}); evaluate the adapter again with "
            f"python -m trainers.evaluate adapter={folder}"
        ) from error
    files[CARD_FILE] = text.encode()
    _show(files, text, config)
    if config.dry_run:
        print(f"dry run: nothing was sent to {config.repo}")
        return
    pushed = push(
        config.repo,
        dict(sorted(files.items())),
        branch=config.revision,
        private=config.private,
        stale=[*_REPORTS, _RECIPE],
        message=f"Publish {manifest.method} adapter for {manifest.base_model_name_or_path}",
    )
    for note in pushed.notes:
        print(note)
    done = "published as commit" if pushed.changed else "nothing to commit, these files are there already at commit"
    print(f"{done} {pushed.commit} on {pushed.branch}: {pushed.url}")
    print(f'load_adapter(pipe, "{config.repo}", revision="{pushed.commit}") takes just this version')


def _choose_transfer() -> None:
    """Servers other than the Hub itself are sent large files by LFS, which all of them know; xet has no fall-back.

    The client reads the variable when it is imported, and one that is set is left as it is.
    """
    host = urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname
    if host and host != "huggingface.co":
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")


def read_adapter(folder: Path) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest and both files of an adapter, checked as for loading.

    Raises:
        AdapterError: there is none, it is damaged, or was replaced while it was read.
    """
    from checkpoints.load import read_tensors
    from checkpoints.manifest import CONFIG_FILE, TENSORS_FILE, AdapterError, read_manifest

    manifest = read_manifest(folder)
    read_tensors(folder)
    files = {name: (folder / name).read_bytes() for name in (CONFIG_FILE, TENSORS_FILE)}
    if read_manifest(folder) != manifest or hashlib.sha256(files[TENSORS_FILE]).hexdigest() != manifest.tensors_sha256:
        raise AdapterError(f"{folder} was replaced while it was read; publish it again")
    return manifest, files


def own_report(
    folder: Path, manifest: Manifest, files: Mapping[str, bytes], *, unmeasured: bool
) -> dict[str, Any] | None:
    """The report among the files, of this very adapter; None if there is none and that is wanted.

    Raises:
        AdapterError: no report, another adapter's, a damaged one, or `unmeasured` of one that is measured.
    """
    from checkpoints.manifest import CONFIG_FILE, AdapterError

    path, advice = folder / "report.json", f"run python -m trainers.evaluate adapter={folder}"
    if "report.json" not in files:
        if unmeasured:
            return None
        raise AdapterError(f"{folder} has no report.json: {advice}, or say unmeasured=true")
    try:
        report = json.loads(files["report.json"])
        rows = len(report["rows"])
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise AdapterError(f"{path} is damaged ({error!r}); {advice}") from error
    own = {
        "method": manifest.method,
        "adapter_sha256": hashlib.sha256(files[CONFIG_FILE]).hexdigest(),
        "backbone_fingerprint": manifest.base_model_fingerprint,
    }
    other = [name for name, value in own.items() if report.get(name) != value]
    if other and not unmeasured:
        raise AdapterError(f"{path} was not measured on this adapter (other {', '.join(other)}): {advice}")
    if not other and unmeasured:
        raise AdapterError(f"{path} has {rows} rows measured on this adapter; leave unmeasured=true out")
    return None if other else report


def _present(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _license(manifest: Manifest, chosen: str | None) -> License:
    """The chosen licence, else what the backbone's own card says.

    Raises:
        AdapterError: the backbone names none, and none was chosen.
    """
    from checkpoints.card import License
    from checkpoints.manifest import AdapterError, one_sentence

    if chosen:
        return License(chosen)
    base = manifest.base_model_name_or_path
    try:
        data = _backbone_card(manifest)
    except Exception as error:
        raise AdapterError(f"the licence of {base} cannot be read ({one_sentence(error)}); give license=") from error
    if not isinstance(data.license, str):
        raise AdapterError(f"the card of {base} names no licence; give license=, for example license=apache-2.0")
    return License(data.license, data.license_name, _whole_link(data.license_link, manifest), inherited=True)


def _whole_link(link: str | None, manifest: Manifest) -> str | None:
    """A link that also holds in another repository than the backbone's; None if there is none."""
    from huggingface_hub import constants

    from checkpoints.card import base_on_hub

    if not link or urlsplit(link).scheme:
        return link
    base = base_on_hub(manifest)
    return f"{constants.ENDPOINT}/{base}/blob/{manifest.base_model_revision or 'main'}/{link}" if base else None


def _backbone_card(manifest: Manifest) -> Any:
    from huggingface_hub import ModelCard, hf_hub_download

    from checkpoints.card import base_on_hub
    from checkpoints.hub import because
    from checkpoints.manifest import CARD_FILE

    base = manifest.base_model_name_or_path
    if base_on_hub(manifest):
        try:
            path = hf_hub_download(base, CARD_FILE, revision=manifest.base_model_revision)
        except Exception as error:
            raise OSError(because(error, base)) from error
    else:
        name = base.removeprefix("embedded:")
        path = (_EMBEDDED / name if base != name else Path(base)) / CARD_FILE
    return ModelCard(Path(path).read_text(encoding="utf-8")).data


def _show(files: Mapping[str, bytes], card: str, config: PublishConfig) -> None:
    kind = "private " if config.private else ""
    print(f"to {kind}{config.repo}, branch {config.revision or 'main'}:")
    for name, content in sorted(files.items()):
        print(f"  {len(content):>13,} bytes  {name}")
    print(f"  {sum(map(len, files.values())):>13,} bytes  in {len(files)} files")
    if config.dry_run:
        print("\n" + card.partition("\n---\n")[0] + "\n---\n")


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
