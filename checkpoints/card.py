"""The README.md of an adapter: how to load it, what was measured, where it ends, and the Hub's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.load import known_methods, method_module
from checkpoints.manifest import HUB_ID, Manifest

PLOT_FILE = "report.png"

# What the Hub's filter calls a backbone, and an input to try it with; it has no name for class-conditional images.
_TASKS = {"PixArtTransformer2DModel": ("text-to-image", '"a red circle on a grey background"')}
_ANY_INPUT = "[1]"
_METRICS = {"psnr_db": "PSNR (dB)", "ssim": "SSIM", "mse": "mean squared error"}
_WORK = {"blocks", "tokens_per_step", "tokens_per_s", "kept_units"}


@dataclass(frozen=True)
class License:
    """Under which terms an adapter is published.

    Attributes:
        id: as the Hub calls it: apache-2.0, openrail++, other ...
        name, link: of a licence whose id is other.
        inherited: it is the backbone's own, not one that the publisher chose.
    """

    id: str
    name: str | None = None
    link: str | None = None
    inherited: bool = False


@dataclass(frozen=True)
class Place:
    """Where an adapter is published.

    Attributes:
        repo: Hub id.
        revision: branch that has to be named to load it; None is the default one.
        plot: report.png lies beside the card.
    """

    repo: str
    license: License
    revision: str | None = None
    plot: bool = False


def card(
    manifest: Manifest, report: Mapping[str, Any] | None = None, verdict: str = "", place: Place | None = None
) -> str:
    """Markdown with the Hub's front matter.

    Args:
        manifest: the adapter's.
        report: the content of `report.json`; None says "unmeasured".
        verdict: one paragraph on whether it beats the untrained and plain alternatives.
        place: where it is published; None is a folder on its maker's disk.
    """
    name = manifest.made_by.get("recipe") or manifest.method
    parts = [
        f"---\n{_metadata(manifest, report, name, place)}\n---",
        f"# {name}: {manifest.method} for {manifest.base_model_name_or_path}",
        _what(manifest),
        f"## Load it\n\n{_snippet(manifest, place)}",
        f"## Measured\n\n{_measured(manifest, report, verdict, place)}",
        f"## Limits\n\n{_limits(manifest)}",
        *_notes(manifest),
        *([f"## Licence\n\n{_license(manifest, place.license)}"] if place else []),
        f"## Made by\n\n{_table(manifest.made_by)}",
    ]
    return "\n\n".join(parts) + "\n"


def base_on_hub(manifest: Manifest) -> str | None:
    """The backbone's Hub id; None if it is a folder or an embedded one."""
    base = manifest.base_model_name_or_path
    return base if HUB_ID.fullmatch(base) and not Path(base).exists() else None


def _task(manifest: Manifest) -> tuple[str | None, str]:
    if _is_language_model(manifest):
        return "text-generation", ""
    return _TASKS.get(str(manifest.base_model_config.get("class")), (None, _ANY_INPUT))


def _metadata(manifest: Manifest, report: Mapping[str, Any] | None, name: str, place: Place | None) -> str:
    from huggingface_hub import ModelCardData

    base, (task, _) = base_on_hub(manifest), _task(manifest)
    terms = place.license if place else None
    results = _results(report, task) if report and task else None
    data = ModelCardData(
        license=terms.id if terms else None,
        license_name=terms.name if terms else None,
        license_link=terms.link if terms else None,
        library_name="afterburner",
        base_model=base,  # the Hub refuses one that is no Hub id
        base_model_relation="adapter" if base else None,
        pipeline_tag=task,
        tags=["afterburner", "acceleration", _library(manifest), manifest.method],
        model_name=name if results else None,
        eval_results=results,
    )
    return str(data.to_yaml())


def _results(report: Mapping[str, Any], task: str) -> list[Any] | None:
    """The adapter's row as entries of the Hub's model index."""
    from huggingface_hub import EvalResult

    inputs = f"{report['inputs']} held-out inputs" if "inputs" in report else "held-out inputs"
    compared = f"{inputs}, against {report['reference']}" if "reference" in report else inputs
    return [
        EvalResult(
            task_type=task,
            dataset_type="held-out",
            dataset_name=compared,
            metric_type=metric,
            metric_name=_METRICS.get(metric, metric),
            metric_value=value,
        )
        for row in report["rows"]
        if row["kind"] == "adapter"
        for metric, value in {"speedup": row["speedup"], **row["quality"]}.items()
    ] or None


def _what(manifest: Manifest) -> str:
    revision = f" at revision `{manifest.base_model_revision}`" if manifest.base_model_revision else ""
    return (
        f"A small module that accelerates the frozen backbone `{manifest.base_model_name_or_path}`{revision}. "
        "The backbone's own weights stay as they are and are not in here."
    )


def _snippet(manifest: Manifest, place: Place | None) -> str:
    base = manifest.base_model_name_or_path
    path = f"data/embedded/{base.removeprefix('embedded:')}" if base.startswith("embedded:") else base
    at_base = f', revision="{manifest.base_model_revision}"' if manifest.base_model_revision else ""
    at = f', revision="{place.revision}"' if place and place.revision else ""
    if _is_language_model(manifest):
        adapter = place.repo if place else "<this folder or its Hub id>"
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "from afterburner import load_adapter",
            f'model = AutoModelForCausalLM.from_pretrained("{path}"{at_base})',
            f'tokenizer = AutoTokenizer.from_pretrained("{path}"{at_base})',
            f'handle = load_adapter(model, "{adapter}"{at})',
            'ids = model.generate(**tokenizer("...", return_tensors="pt"), max_new_tokens=96)',
            "# handle.detach() gives the plain model back",
        ]
        return "\n".join(["```python", *lines, "```"])
    lines = [
        "from diffusers import DiffusionPipeline",
        "from afterburner import load_adapter",
        f'pipe = DiffusionPipeline.from_pretrained("{path}"{at_base})',
        f'handle = load_adapter(pipe, "{place.repo if place else "<this folder>"}"{at})',
        f"images = pipe({_task(manifest)[1]}, **handle.call_kwargs).images  # handle.detach() undoes it",
    ]
    return "\n".join(["```python", *lines, "```"])


def _library(manifest: Manifest) -> str:
    return "transformers" if _is_language_model(manifest) else "diffusers"


def _is_language_model(manifest: Manifest) -> bool:
    return str(manifest.base_model_config.get("class", "")).endswith("ForCausalLM")


def _notes(manifest: Manifest) -> list[str]:
    """What the method itself has to say to users, in its module's `CARD_NOTES`."""
    if manifest.method not in known_methods():
        return []
    notes = getattr(method_module(manifest.method), "CARD_NOTES", "")
    return [f"## Good to know\n\n{notes}"] if notes else []


def _measured(manifest: Manifest, report: Mapping[str, Any] | None, verdict: str, place: Place | None) -> str:
    if report is None:
        adapter = place.repo if place else "<this folder>"
        return f"Unmeasured; `python -m trainers.evaluate adapter={adapter}` compares it with its backbone and rivals."
    rows = report["rows"]
    metrics = sorted({key for row in rows for key in row["quality"]})
    work = sorted({key for row in rows for key in row["work"]} & _WORK)
    head = ["", "kind", "speedup", "range", "latency (ms)", *work, *metrics]
    lines = [_line(head), _line(["---"] * len(head)), *(_line(_cells(row, work, metrics)) for row in rows)]
    code = report.get("commit") or "an unknown commit"
    where = f"On {report['device']}, code {code}, seed {report['seed']}; speedup is against the row of kind baseline."
    plot = f"![Quality against speed]({PLOT_FILE})" if place and place.plot else ""
    return "\n\n".join(part for part in ("\n".join(lines), verdict, plot, where) if part)


def _cells(row: Mapping[str, Any], work: list[str], metrics: list[str]) -> list[str]:
    low, high = row["speedup_range"]
    measured = [f"{row['speedup']:.2f}x", f"{low:.2f} to {high:.2f}", f"{1000 * row['latency_s']:.1f}"]
    values = [row["work"].get(key) for key in work] + [row["quality"].get(key) for key in metrics]
    return [str(row["name"]), str(row["kind"]), *measured, *("" if v is None else f"{v:.4g}" for v in values)]


def _limits(manifest: Manifest) -> str:
    base = f"Only for `{manifest.base_model_name_or_path}` with fingerprint `{manifest.base_model_fingerprint[:19]}...`"
    if not manifest.valid_for:
        return f"{base}; `load_adapter` refuses anything else."
    return f"{base} and the settings below; anything else is refused.\n\n{_table(manifest.valid_for)}"


def _license(manifest: Manifest, terms: License) -> str:
    what = f"[{terms.name or terms.id}]({terms.link})" if terms.link else f"`{terms.name or terms.id}`"
    base = f"`{manifest.base_model_name_or_path}`"
    if terms.inherited:
        return f"{what}: the licence of the backbone {base}, on whose weights and outputs this adapter was trained."
    return f"{what}: chosen for this adapter by who published it. The backbone {base} keeps a licence of its own."


def _table(values: Mapping[str, Any]) -> str:
    return "\n".join([_line(["", ""]), _line(["---", "---"]), *(_line([k, f"`{values[k]}`"]) for k in sorted(values))])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
