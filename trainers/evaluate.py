"""`python -m trainers.evaluate adapter=<dir|hub id> [key=value]`: measure an exported adapter against its rivals."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.config import EvaluateConfig
from trainers.recipes import exit_on_error, plain_command

if TYPE_CHECKING:
    from checkpoints.manifest import Manifest

USAGE = """usage: python -m trainers.evaluate adapter=<folder or Hub id> [key=value ...]

Runs the adapter, its backbone, and the untrained and plain alternatives at about the adapter's work in turns, and
writes report.json, report.md, report.png and, for images, samples/grid.png.
--print shows the resolved settings and exits."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command.  Exit codes: 0 done, 1 refused adapter or backbone, 2 wrong settings."""
    config = plain_command(EvaluateConfig, sys.argv[1:] if argv is None else argv, USAGE)
    if config is None:
        return 0
    try:
        run(config)
    except (ValueError, OSError) as error:  # AdapterError, a backbone that is not there, no room to write
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure an adapter, write the report and the adapter's card, print the table.

    The method's own `trainers/<method>.py` does the measuring, in `measure(request) -> trainers.evaluation.Measured`.
    One for diffusion pipelines only says what is run and what quality means, in
    `evaluation_setup(driver, adapter_folder, config) -> trainers.evaluation.EvaluationSetup`.

    Returns:
        the content of report.json.
    Raises:
        ValueError: the adapter or the backbone is refused (AdapterError), or the device is not there.
    """
    from rich.console import Console

    from checkpoints.load import local_folder
    from checkpoints.manifest import adapter_sha256, read_manifest
    from trainers import report as reports
    from trainers.evaluation import Request, device_of, measurer
    from trainers.run_folder import code_version

    adapter = local_folder(config.adapter, config.revision)
    manifest, identity = read_manifest(adapter), adapter_sha256(adapter)
    measure = measurer(manifest.method)
    device = device_of(config.device)
    name = config.backbone or manifest.base_model_name_or_path
    console = Console()
    with console.status(f"loading {name}") as status:
        measured = measure(Request(adapter, manifest, name, config, device, status.update))
    code = code_version()
    report = reports.build_report(
        measured.rows,
        method=manifest.method,
        backbone=name,
        device=reports.device_name(device),
        commit=f"{code['commit'] or 'unknown'}{'-dirty' if code['dirty'] else ''}",
        seed=config.evaluation.seed,
        verdict=measured.verdict,
        dtype=config.dtype,
        adapter_seed=manifest.made_by.get("seed"),
        adapter_sha256=identity,
        backbone_fingerprint=manifest.base_model_fingerprint,
        **measured.facts,
    )
    output = _output_folder(config, adapter)
    reports.write_report(output, report, measured.rows, measured.plotted, measured.against)
    if Path(config.adapter).is_dir():  # a snapshot in the Hub's cache is not ours to change
        _refresh_adapter(adapter, manifest, report, output)
    reports.print_table(measured.rows, console)
    console.print(f"report: {output}", highlight=False)
    return report


def _output_folder(config: EvaluateConfig, adapter: Path) -> Path:
    """As asked; else the run that the adapter lies in; else a folder of its own under outputs/."""
    if config.output:
        return Path(config.output)
    if (adapter.parent / "provenance.json").is_file():
        return adapter.parent
    return Path("outputs") / "evaluate" / Path(config.adapter).name


def _refresh_adapter(adapter: Path, manifest: Manifest, report: dict[str, Any], output: Path) -> None:
    """Put the measured table into the adapter's card and the report beside it, so that they travel together."""
    from checkpoints.card import card
    from checkpoints.save import replace_card
    from trainers.run_folder import atomic_write
    from trainers.verdict import verdict_text

    for name in ("report.json", "report.md", "report.png"):
        atomic_write(adapter / name, (output / name).read_bytes())
    replace_card(adapter, card(manifest, report, verdict_text(report["verdict"])))


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
