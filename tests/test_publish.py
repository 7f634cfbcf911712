"""Publishing: what is checked, what the card says, what is on the hub afterwards."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from checkpoints.card import License, Place, card
from checkpoints.manifest import read_manifest
from tests.hub_client import Client
from tests.hub_repository import File
from tests.hub_server import HubServer
from tests.published import PUBLISH, contents, make_adapter, make_measured, make_report
from tests.test_commands import typed
from trainers import publish
from trainers.recipes import exit_on_error


def front_matter(text: str) -> dict:
    """The metadata that a card begins with."""
    return yaml.safe_load(text.split("---\n")[1])


def test_everything_arrives_in_one_commit(client: Client, hub: HubServer) -> None:
    make_measured(client.folder / "adapter")
    done = client.run(*PUBLISH)
    assert done.code == 0, done.err
    files = hub.tree("you/fast")
    text = files.pop("README.md").decode()
    assert files == contents(client.folder / "adapter")
    assert len(hub.repos["you/fast"].commits) == 2  # the server's own, and ours
    assert hub.repos["you/fast"].branches["main"] in done.out
    told = [line.split()[-1] for line in done.out.splitlines() if " bytes  " in line]
    assert told == [*sorted([*files, "README.md"]), "files"]
    assert 'load_adapter(pipe, "you/fast")' in text and "![Quality against speed](report.png)" in text
    assert "| fake | adapter | 2.25x | 2.10 to 2.40 | 220.0 | 80 | 49.5 |" in text
    data = front_matter(text)
    assert (data["license"], data["library_name"]) == ("mit", "afterburner")
    assert "chosen for this adapter by who published it" in text


def test_the_same_again_is_no_commit_and_an_older_files_leave(client: Client, hub: HubServer) -> None:
    make_measured(client.folder / "adapter")
    (client.folder / "provenance.json").write_text("{}")
    (client.folder / "config.yaml").write_text("method: fake\n")
    assert client.run(*PUBLISH).code == 0
    assert hub.tree("you/fast")["config.yaml"] == b"method: fake\n"
    repo = hub.repos["you/fast"]
    head = repo.branches["main"]
    again = client.run(*PUBLISH)
    assert again.code == 0 and f"nothing to commit, these files are there already at commit {head}" in again.out
    assert repo.branches["main"] == head and len(repo.commits) == 2

    repo.commit("main", {**repo.commits[head], "mine.txt": File(b"x", False)}, "by hand")
    shutil.rmtree(client.folder / "adapter")
    (client.folder / "provenance.json").unlink()
    make_adapter(client.folder / "adapter", seed=1)
    later = client.run(*PUBLISH, "unmeasured=true")
    assert later.code == 0 and "config.yaml, report.json, report.md, report.png of an earlier publication" in later.out
    assert hub.tree("you/fast").keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors", "mine.txt"}
    assert "Unmeasured" in hub.tree("you/fast")["README.md"].decode()


def test_an_ignore_file_on_the_hub_leaves_nothing_out(client: Client, hub: HubServer) -> None:
    make_measured(client.folder / "adapter")
    repo = hub.create("you/fast")
    repo.commit("main", {".gitignore": File(b"adapter_config.json report.png\n", False)}, "ignores")
    assert client.run(*PUBLISH).code == 0
    assert contents(client.folder / "adapter").items() <= hub.tree("you/fast").items()


def test_a_branch_is_made_from_main_and_a_tag_or_commit_is_refused(client: Client, hub: HubServer) -> None:
    make_measured(client.folder / "adapter")
    assert client.run(*PUBLISH).code == 0
    repo = hub.repos["you/fast"]
    main, repo.tags["v1"] = repo.branches["main"], repo.branches["main"]
    shutil.rmtree(client.folder / "adapter")
    make_measured(client.folder / "adapter", seed=1)
    done = client.run(*PUBLISH, "revision=next/try")
    assert done.code == 0 and "the branch next/try was created from main" in done.out
    assert repo.branches["main"] == main
    card_there = hub.tree("you/fast", "next/try")["README.md"].decode()
    assert 'load_adapter(pipe, "you/fast", revision="next/try")' in card_there
    assert "revision=v1 is a tag" in client.run(*PUBLISH, "revision=v1").sentence
    assert client.run(*PUBLISH, f"revision={main}").code == 2


def test_private_is_made_private_and_never_pushed_to_a_public_place(client: Client, hub: HubServer) -> None:
    make_measured(client.folder / "adapter")
    assert client.run(*PUBLISH, "private=true").code == 0
    assert hub.repos["you/fast"].private
    assert client.run(*PUBLISH).code == 0 and hub.repos["you/fast"].private
    hub.create("you/open")
    refused = client.run(*PUBLISH, "repo=you/open", "private=true")
    assert refused.code == 1 and "exists and is public" in refused.sentence and not hub.tree("you/open")


def test_dry_run_shows_files_and_metadata_and_asks_nobody(client: Client, hub: HubServer) -> None:
    make_measured(client.folder / "adapter")
    done = client.run(*PUBLISH, "dry_run=true", HF_TOKEN="")
    assert done.code == 0 and not hub.requests and not hub.repos
    shown = {line.split()[-1]: line.split()[0].replace(",", "") for line in done.out.splitlines() if " bytes  " in line}
    for name, content in contents(client.folder / "adapter").items():
        assert int(shown[name]) == len(content)
    assert front_matter(done.out)["license"] == "mit" and "nothing was sent" in done.out


def test_help_and_print_need_nothing_heavy(tmp_path: Path) -> None:
    done = typed("trainers.publish", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "python -m trainers.publish" in done.stdout and "dry_run" in done.stdout
    done = typed("trainers.publish", "--print", "adapter=a", "repo=you/x", cwd=tmp_path)
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["repo"] == "you/x"
    done = typed("afterburner", "publish", "--print", "adapter=a", "repo=you/x", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["adapter=a"], "repo is missing"),
        (["adapter=a", "repo=alone"], "repo is 'alone', expected namespace/name"),
        (["adapter=a", "repo=a/b", "revision=../x"], "expected the name of a branch"),
        (["adapter=a", "repo=a/b", "privat=true"], "the nearest key is private"),
    ],
)
def test_wrong_settings_are_told(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_on_error(lambda: publish.main(words)) == 2
    assert sentence in capsys.readouterr().err


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The sentence that a dry run is refused with."""
    assert publish.main([f"adapter={folder}", "repo=you/fast", "license=mit", "dry_run=true", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_report_must_be_this_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    manifest = make_adapter(adapter)
    assert "say unmeasured=true" in refused(adapter, capsys)
    make_report(adapter, manifest)
    assert "leave unmeasured=true out" in refused(adapter, capsys, "unmeasured=true")
    make_report(adapter, manifest, backbone_fingerprint="sha256:0")
    assert "other backbone_fingerprint" in refused(adapter, capsys)
    make_measured(tmp_path / "second", seed=1)
    shutil.copy(tmp_path / "second" / "report.json", adapter)
    assert "not measured on this adapter (other adapter_sha256)" in refused(adapter, capsys)
    for broken in ("{", "[]", "{}", '{"rows": 3}'):
        (adapter / "report.json").write_text(broken)
        assert "report.json is damaged" in refused(adapter, capsys)
    report = make_report(adapter, manifest)
    del report["rows"][1]["latency_s"]
    (adapter / "report.json").write_text(json.dumps(report))
    assert "report.json is damaged (KeyError('latency_s'))" in refused(adapter, capsys)


def test_an_unmeasured_adapter_leaves_another_ones_report_behind(tmp_path: Path, capsys) -> None:
    make_measured(tmp_path / "second", seed=1)
    make_adapter(tmp_path / "adapter")
    shutil.copy(tmp_path / "second" / "report.json", tmp_path / "adapter")
    words = [f"adapter={tmp_path}/adapter", "repo=you/x", "license=mit", "dry_run=true", "unmeasured=true"]
    assert publish.main(words) == 0
    assert "report" not in capsys.readouterr().out


def test_a_damaged_adapter_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    assert "there is no adapter folder" in refused(adapter, capsys)
    make_measured(adapter)
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "is not the file that adapter_config.json was written with" in refused(adapter, capsys)
    (adapter / "adapter_model.safetensors").write_bytes(whole[:-1])
    assert "is truncated" in refused(adapter, capsys)


# Licences: the backbone's own unless one is given.


def inherited(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None) -> tuple[int, str]:
    base = tmp_path / "base"
    base.mkdir(exist_ok=True)
    (base / "README.md").unlink(missing_ok=True)
    if text is not None:
        (base / "README.md").write_text(text)
    make_measured(tmp_path / "adapter", base_model_name_or_path=str(base))
    code = publish.main([f"adapter={tmp_path}/adapter", "repo=you/fast", "dry_run=true"])
    told = capsys.readouterr()
    return code, told.out + told.err


def test_the_licence_is_the_backbones_own_or_has_to_be_given(tmp_path: Path, capsys) -> None:
    terms = {"license": "other", "license_name": "house", "license_link": "https://house.example/terms"}
    code, told = inherited(tmp_path, capsys, f"---\n{yaml.safe_dump(terms)}---\n")
    assert code == 0 and terms.items() <= front_matter(told).items()
    code, told = inherited(tmp_path, capsys, f"---\n{yaml.safe_dump(terms | {'license_link': 'LICENSE'})}---\n")
    assert code == 0 and "license_link" not in front_matter(told)  # no file of that name is published
    code, told = inherited(tmp_path, capsys, "---\ntags: [a]\n---\n")
    assert code == 1 and "names no licence; give license=" in told
    code, told = inherited(tmp_path, capsys, None)
    assert code == 1 and "cannot be read" in told and "give license=" in told


def test_a_hub_backbones_licence_is_read_from_its_card(client: Client, hub: HubServer) -> None:
    base = hub.create("base/pixart")
    text = b"---\nlicense: other\nlicense_name: house\nlicense_link: LICENSE\n---\n# PixArt\n"
    sha = base.commit("main", {"README.md": File(text, False)}, "card")
    entry = {"base_model_name_or_path": "base/pixart", "base_model_revision": sha}
    make_measured(client.folder / "adapter", **entry, base_model_config={"class": "PixArtTransformer2DModel"})
    done = client.run(*PUBLISH[:-1])
    assert done.code == 0, done.err
    text = hub.tree("you/fast")["README.md"].decode()
    data = front_matter(text)
    assert (data["license"], data["license_name"]) == ("other", "house")
    assert data["license_link"] == f"{hub.url}/base/pixart/blob/{sha}/LICENSE"
    assert (data["base_model"], data["base_model_relation"]) == ("base/pixart", "adapter")
    assert data["pipeline_tag"] == "text-to-image" and "the licence of the backbone `base/pixart`" in text
    (result,) = data["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in result["metrics"]} == {"speedup": 2.25, "psnr_db": 49.5}
    assert result["dataset"]["name"] == "64 held-out inputs, against 50 plain steps"
    again = client.run(*PUBLISH[:-1], HF_HUB_OFFLINE="1")  # now from the cache
    assert "HF_HUB_OFFLINE is set" in again.sentence


def test_the_cards_python_is_python_and_names_the_place(tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base_model_name_or_path="base/pixart", base_model_revision="abc")
    text = card(read_manifest(tmp_path / "adapter"), None, "", Place("you/fast", License("mit"), "next"))
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    compile(code, "card", "exec")
    assert len(code.splitlines()) == 5 and 'from_pretrained("base/pixart", revision="abc")' in code
    assert 'load_adapter(pipe, "you/fast", revision="next")' in code
    odd = replace(read_manifest(tmp_path / "adapter"), made_by={"recipe": "a: b #c"})
    assert front_matter(card(odd))["tags"][0] == "afterburner"
