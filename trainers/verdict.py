"""What a table of measured rows says about the adapter, in data and in words, whichever way it turns out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainers.rows import Row

_SAME_LATENCY = 0.99
"""A rival that takes at least this share of the adapter's time is equally slow: medians are no better than that."""

_SAME_MEMORY = 1.05
"""A rival may hold so much of the adapter's bytes and count as its equal."""


def equal_latency_verdict(rows: Sequence[Row], metric: str = "psnr_db") -> dict[str, Any] | None:
    """Is the adapter closer to the reference than every rival that takes as long?

    A rival is a row of kind untrained, plain or peer.  Of each group (one method at several settings) the row that
    counts is the fastest one that is not faster than the adapter: with arbitrarily more time any method reaches the
    reference.  A *faster* row that is as close beats the adapter outright and is listed too.

    Args:
        rows: of one report; the higher `metric`, the better.
    Returns:
        None without an adapter row; else `adapter`, `metric`, `value`, `latency_s`, `rivals` (each with `margin`,
        positive where the adapter is closer, `closer` and `faster`), `unmatched` (groups with no row as slow as the
        adapter) and `wins`: closer than every listed rival, and no group unmatched.  Further adapter rows are operating
        points of the same adapter: `points` has a verdict for each of them.
    """
    adapters = [row for row in rows if row.kind == "adapter"]
    if not adapters or metric not in adapters[0].quality:
        return None
    verdict, *points = [_verdict_of(adapter, rows, metric) for adapter in adapters]
    return {**verdict, "points": points} if points else verdict


def _verdict_of(adapter: Row, rows: Sequence[Row], metric: str) -> dict[str, Any]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.kind in ("untrained", "plain", "peer") and metric in row.quality:
            groups.setdefault(row.group or row.name, []).append(row)
    rivals, unmatched = [], []
    for group, members in groups.items():
        slower = [row for row in members if row.latency_s >= _SAME_LATENCY * adapter.latency_s]
        if slower:
            rivals.append(_compare(adapter, min(slower, key=lambda row: row.latency_s), metric, faster=False))
        else:
            unmatched.append(group)
        quicker = [row for row in members if row not in slower and row.quality[metric] >= adapter.quality[metric]]
        rivals += [_compare(adapter, row, metric, faster=True) for row in quicker]
    return {
        "adapter": adapter.name,
        "metric": metric,
        "value": adapter.quality[metric],
        "latency_s": adapter.latency_s,
        "rivals": rivals,
        "unmatched": unmatched,
        "wins": bool(rivals) and not unmatched and all(rival["closer"] for rival in rivals),
    }


def _compare(adapter: Row, rival: Row, metric: str, *, faster: bool) -> dict[str, Any]:
    margin = adapter.quality[metric] - rival.quality[metric]
    return {
        "name": rival.name,
        "group": rival.group or rival.name,
        "kind": rival.kind,
        "latency_s": rival.latency_s,
        "value": rival.quality[metric],
        "margin": margin,
        "closer": margin > 0,
        "faster": faster,
    }


def lossless_verdict(rows: Sequence[Row], metric: str = "exact_match") -> dict[str, Any] | None:
    """Is the adapter faster than every rival, where the output is the same whatever runs?

    A rival is a row of kind untrained, plain or peer; of each group the fastest counts.  A rival whose output differs
    from the backbone's more often than the adapter's has given up what is compared, and is listed without counting.

    Returns:
        None without an adapter row; else `adapter` (the first such row), `metric` ("speedup"), `value`, `exact` (its
        share of equal outputs), `latency_s`, `variants` (speedup by name of the other adapter rows), `rivals` (each
        with `margin`, adapter's speedup over its own less one, `faster` for the rival being the faster one, and
        `exact`) and `wins`: faster than the baseline and every exact rival.
    """
    adapter = next((row for row in rows if row.kind == "adapter"), None)
    if adapter is None:
        return None
    groups: dict[str, Row] = {}
    for row in rows:
        if row.kind in ("untrained", "plain", "peer"):
            best = groups.setdefault(row.group or row.name, row)
            groups[row.group or row.name] = max(best, row, key=lambda row: row.speedup)
    own = adapter.quality.get(metric, 1.0)
    rivals = [
        {
            "name": row.name,
            "group": group,
            "kind": row.kind,
            "latency_s": row.latency_s,
            "value": row.speedup,
            "margin": adapter.speedup / row.speedup - 1,
            "exact": row.quality.get(metric, 1.0),
            "faster": row.speedup >= adapter.speedup,
        }
        for group, row in groups.items()
    ]
    lost = [rival for rival in rivals if rival["faster"] and rival["exact"] >= own]
    return {
        "adapter": adapter.name,
        "metric": "speedup",
        "value": adapter.speedup,
        "exact": own,
        "latency_s": adapter.latency_s,
        "variants": {row.name: row.speedup for row in rows if row.kind == "adapter" and row is not adapter},
        "rivals": rivals,
        "wins": adapter.speedup > 1 and not lost,
    }


def equal_memory_verdict(rows: Sequence[Row], metric: str) -> dict[str, Any] | None:
    """Is more right with the adapter's cache than with any other of as many bytes?

    Of each group of rivals the row counts that holds most without holding more than the adapter (a twentieth is
    allowed: scores and bases weigh something).

    Args:
        metric: `accuracy`, of which more is better, or `perplexity`, of which less is.
    Returns:
        None without an adapter row; else `adapter` (the first such row), `metric`, `value`, `full` (the baseline's
        value), `cache_bytes`, `rivals` (each with `margin`, positive where the adapter is better, and `cache_bytes`),
        `unmatched` (groups that hold more in every row) and `wins`.
    """
    adapter = next((row for row in rows if row.kind == "adapter"), None)
    if adapter is None:
        return None
    sign = -1 if metric == "perplexity" else 1
    most = _SAME_MEMORY * adapter.work["cache_bytes"]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.kind in ("untrained", "plain", "peer"):
            groups.setdefault(row.group or row.name, []).append(row)
    rivals, unmatched = [], []
    for group, members in groups.items():
        fitting = [row for row in members if row.work["cache_bytes"] <= most]
        if not fitting:
            unmatched.append(group)
            continue
        row = max(fitting, key=lambda row: row.work["cache_bytes"])
        rivals.append(
            {
                "name": row.name,
                "group": group,
                "kind": row.kind,
                "latency_s": row.latency_s,
                "value": row.quality[metric],
                "margin": sign * (adapter.quality[metric] - row.quality[metric]),
                "cache_bytes": row.work["cache_bytes"],
            }
        )
    baseline = next(row for row in rows if row.kind == "baseline")
    return {
        "adapter": adapter.name,
        "metric": metric,
        "value": adapter.quality[metric],
        "full": baseline.quality[metric],
        "latency_s": adapter.latency_s,
        "cache_bytes": adapter.work["cache_bytes"],
        "share": adapter.work["cache_bytes"] / baseline.work["cache_bytes"],
        "rivals": rivals,
        "unmatched": unmatched,
        "wins": bool(rivals) and all(rival["margin"] > 0 for rival in rivals),
    }


def _memory_text(verdict: dict[str, Any]) -> str:
    digits = 2 if verdict["metric"] == "perplexity" else 3
    sentences = [
        f"**{verdict['adapter']}** has {verdict['metric']} {verdict['value']:.{digits}f} with {verdict['share']:.1%} "
        f"of the full cache's bytes, which has {verdict['full']:.{digits}f}."
    ]
    for rival in verdict["rivals"]:
        side = "worse" if rival["margin"] > 0 else "better" if rival["margin"] < 0 else "equally good"
        sentences.append(f"{rival['name']} is {side} at {rival['value']:.{digits}f}.")
    if verdict["unmatched"]:
        sentences.append(f"No row of {', '.join(verdict['unmatched'])} holds so little.")
    if lost := [rival["name"] for rival in verdict["rivals"] if rival["margin"] < 0]:
        sentences.append(f"**It loses to {', '.join(lost)}: use that instead.**")
    elif verdict["wins"]:
        sentences.append("It is better than every rival of as many bytes.")
    return " ".join(sentences)


def verdict_text(verdict: dict[str, Any] | None) -> str:
    """The verdict as one paragraph for the report and the card."""
    if verdict is None:
        return "There is no adapter among the rows, so there is nothing to compare."
    if "cache_bytes" in verdict:
        return _memory_text(verdict)
    if verdict["metric"] == "speedup":
        return _lossless_text(verdict)
    unit = " dB" if verdict["metric"].endswith("_db") else ""
    name = verdict["metric"].removesuffix("_db").upper()
    time = f"{verdict['latency_s'] * 1000:.0f} ms"
    opening = f"**{verdict['adapter']}** reaches {verdict['value']:.2f}{unit} {name} in {time}."
    sentences = [opening, *(_rival_sentence(rival, unit) for rival in verdict["rivals"])]
    if verdict["unmatched"]:
        groups = ", ".join(verdict["unmatched"])
        sentences.append(f"No row of {groups} takes as long as the adapter, so nothing is shown against it.")
    if not verdict["rivals"] and not verdict["unmatched"]:
        sentences.append("No rival was measured.")
    elif verdict["wins"]:
        sentences.append("It is closer to the reference than every rival at equal or higher latency.")
    elif lost := [rival["name"] for rival in verdict["rivals"] if not rival["closer"]]:
        sentences.append(f"**It loses to {', '.join(lost)}: use that instead.**")
    return "\n\n".join([" ".join(sentences), *map(verdict_text, verdict.get("points", []))])


def _rival_sentence(rival: dict[str, Any], unit: str) -> str:
    side = "closer than" if rival["closer"] else "farther than" if rival["margin"] < 0 else "exactly as close as"
    time = f"{rival['latency_s'] * 1000:.0f} ms" + (", faster than the adapter" if rival["faster"] else "")
    return f"It is {abs(rival['margin']):.2f}{unit} {side} {rival['name']} ({rival['value']:.2f}{unit}, {time})."


def _lossless_text(verdict: dict[str, Any]) -> str:
    sentences = [
        f"**{verdict['adapter']}** is {verdict['value']:.2f}x as fast as plain decoding, with the same tokens in "
        f"{verdict['exact']:.1%} of the outputs."
    ]
    for rival in verdict["rivals"]:
        side = "slower" if rival["margin"] > 0 else "faster" if rival["margin"] < 0 else "equally fast"
        exact = f", with the same tokens in {rival['exact']:.1%}" if rival["exact"] < verdict["exact"] else ""
        sentences.append(f"{rival['name']} is {side} at {rival['value']:.2f}x{exact}.")
    for name, speedup in verdict["variants"].items():
        side = "faster" if speedup > verdict["value"] else "no faster"
        sentences.append(f"Its variant {name} is {side} at {speedup:.2f}x.")
    lost = [r["name"] for r in verdict["rivals"] if r["faster"] and r["exact"] >= verdict["exact"]]
    if lost:
        sentences.append(f"**It loses to {', '.join(lost)}: use that instead.**")
    elif verdict["value"] <= 1:
        sentences.append("**It is no faster than plain decoding: do without it.**")
    elif verdict["rivals"]:
        sentences.append("It is faster than every rival with the same output.")
    else:
        sentences.append("No rival was measured.")
    return " ".join(sentences)
