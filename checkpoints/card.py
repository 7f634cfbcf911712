"""The README.md of an adapter: how to load it, what was measured, and where it ends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from checkpoints.load import known_methods, method_module
from checkpoints.manifest import Manifest

_WORK = {"blocks", "tokens_per_step", "tokens_per_s", "kept_units"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def card(manifest: Manifest, report: Mapping[str, Any] | None = None, verdict: str = "") -> str:
    """Markdown with the Hub's front matter.

    Args:
        manifest: the adapter's.
        report: the content of `report.json`; None says "unmeasured".
        verdict: one paragraph on whether it beats the untrained and plain alternatives.
    """
    name = manifest.made_by.get("recipe", manifest.method)
    parts = [
        _front_matter(manifest),
        f"# {name}: {manifest.method} for {manifest.base_model_name_or_path}",
        "A small module that accelerates a frozen backbone, whose own weights stay as they are and are not in here.",
        f"## Load it\n\n{_snippet(manifest)}",
        f"## Measured\n\n{_measured(report, verdict)}",
        f"## Limits\n\n{_limits(manifest)}",
        *_notes(manifest),
        f"## Made by\n\n{_table(manifest.made_by)}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(manifest: Manifest) -> str:
    lines = [f"library_name: {'transformers' if _is_language_model(manifest) else 'diffusers'}"]
    if _HUB_ID.fullmatch(manifest.base_model_name_or_path):  # the Hub refuses a base_model that is no Hub id
        lines.append(f"base_model: {manifest.base_model_name_or_path}")
    lines += ["tags:", "- afterburner", "- acceleration", f"- {manifest.method}"]
    return "\n".join(["---", *lines, "---"])


def _snippet(manifest: Manifest) -> str:
    base = manifest.base_model_name_or_path
    path = f"data/embedded/{base.removeprefix('embedded:')}" if base.startswith("embedded:") else base
    revision = f', revision="{manifest.base_model_revision}"' if manifest.base_model_revision else ""
    if _is_language_model(manifest):
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "from afterburner import load_adapter",
            f'model = AutoModelForCausalLM.from_pretrained("{path}"{revision})',
            f'tokenizer = AutoTokenizer.from_pretrained("{path}"{revision})',
            'handle = load_adapter(model, "<this folder or its Hub id>")',
            'ids = model.generate(**tokenizer("...", return_tensors="pt"), max_new_tokens=96)',
            "# handle.detach() gives the plain model back",
        ]
        return "\n".join(["```python", *lines, "```"])
    lines = [
        "from diffusers import DiffusionPipeline",
        "from afterburner import load_adapter",
        f'pipe = DiffusionPipeline.from_pretrained("{path}"{revision})',
        'handle = load_adapter(pipe, "<this folder or its Hub id>")',
        "images = pipe(inputs, **handle.call_kwargs).images  # handle.detach() gives the plain pipeline back",
    ]
    return "\n".join(["```python", *lines, "```"])


def _is_language_model(manifest: Manifest) -> bool:
    return str(manifest.base_model_config.get("class", "")).endswith("ForCausalLM")


def _notes(manifest: Manifest) -> list[str]:
    """What the method itself has to say to users, in its module's `CARD_NOTES`."""
    if manifest.method not in known_methods():
        return []
    notes = getattr(method_module(manifest.method), "CARD_NOTES", "")
    return [f"## Good to know\n\n{notes}"] if notes else []


def _measured(report: Mapping[str, Any] | None, verdict: str) -> str:
    if report is None:
        return (
            "Unmeasured; `python -m trainers.evaluate adapter=<this folder>` compares it with its backbone and rivals."
        )
    rows = report["rows"]
    metrics = sorted({key for row in rows for key in row["quality"]})
    work = sorted({key for row in rows for key in row["work"]} & _WORK)
    head = ["", "kind", "speedup", "range", "latency (ms)", *work, *metrics]
    lines = [_line(head), _line(["---"] * len(head)), *(_line(_cells(row, work, metrics)) for row in rows)]
    code = report.get("commit") or "an unknown commit"
    place = f"On {report['device']}, code {code}, seed {report['seed']}; speedup is against the row of kind baseline."
    return "\n\n".join(part for part in ("\n".join(lines), place, verdict) if part)


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


def _table(values: Mapping[str, Any]) -> str:
    return "\n".join([_line(["", ""]), _line(["---", "---"]), *(_line([k, f"`{values[k]}`"]) for k in sorted(values))])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
