"""A report as words and a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

COLOURS = {
    "clean": "green",
    "noise": "green",
    "single-op": "red",
    "systematic": "red",
    "invalid": "yellow",
    "inconclusive": "yellow",
}
_SHOWN = 16


def sentence(report: Mapping[str, Any]) -> str:
    """The verdict as a person would say it."""
    engines = report["engines"]
    pair = f"{engines['ours'] or 'ours'} and {engines['reference'] or 'the reference'}"
    verdict, first = report["verdict"], report["first"]
    if verdict == "clean":
        return f"{pair} agree within f32 arithmetic on all {len(report['taps'])} taps."
    if verdict == "noise":
        return (
            f"{pair} differ as their arithmetic makes them differ, and nowhere more: no operation is broken "
            f"({len(report['taps'])} taps)."
        )
    if verdict == "invalid":
        return f"Not a comparison: {report['why']}."
    if verdict == "inconclusive":
        return f"No verdict: {report['why']}."
    return _fault(report, first)


def _fault(report: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    where = f"{first['tap']} ({report['class']}"
    where += f", weight {first['weight']}" if first["weight"] else ""
    where += f", {first['qtype']})" if first["qtype"] else ")"
    broken = [tap for tap in report["taps"] if tap["broken"]]
    text = f"The first broken operation is {where}. "
    factor = report["factor"]
    if report["verdict"] == "systematic" and factor:
        text += f"{len(broken)} taps are broken; what they share is {factor['kind']} {factor['value']}. "
    cause = report["cause"]
    if cause:
        return text + f"Cause: {cause['name']} ({cause['evidence']}; confidence {cause['confidence']:.2f})."
    return text + "Cause: unknown."


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print the sentence and the taps that matter: the broken ones, and the largest local divergences."""
    verdict = report["verdict"]
    console.print(f"[bold {COLOURS[verdict]}]{verdict}[/]  {sentence(report)}", highlight=False)
    axes = report["axes"]
    peak = "not finite" if axes["peak"] is None else f"{axes['peak']:.3g}"
    console.print(
        f"local divergence: spread over layers {axes['spread']:.2f} (1 is even), peak {peak}", highlight=False
    )
    rows = _chosen(report["taps"])
    if rows:
        console.print(_table(rows))
    for side, names in report["unmatched"].items():
        if names:
            listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            console.print(
                f"only in {'ours' if side == 'ours' else 'the reference'}: {listed}", highlight=False
            )
    for note in report["notes"][:12]:
        console.print(f"note: {note}", highlight=False)


def _chosen(taps: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Broken taps in order, filled up with those nearest to or above their floor."""
    broken = [tap for tap in taps if tap["broken"]][:_SHOWN]

    def excess(tap: Mapping[str, Any]) -> float:
        local, floor = tap["local_relative_l2"], tap["noise_floor"]
        return (local or 0.0) / floor if floor else 0.0

    others = sorted((tap for tap in taps if not tap["broken"]), key=excess, reverse=True)
    chosen = {tap["name"] for tap in [*broken, *others[: max(0, 8 - len(broken))]]}
    return [tap for tap in taps if tap["name"] in chosen]


def _table(rows: list[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("tap", "type", "|a-b|/|b|", "|a|/|b|", "cosine", "local", "floor", "by", ""):
        table.add_column(heading, justify="left" if heading in ("tap", "type", "by", "") else "right")
    for tap in rows:
        table.add_row(
            tap["name"],
            tap["qtype"] or "",
            *(
                _number(tap[key])
                for key in ("relative_l2", "norm_ratio", "cosine", "local_relative_l2", "noise_floor")
            ),
            tap["method"],
            "[red]broken[/]" if tap["broken"] else "" if tap["aligned"] == "as-is" else tap["aligned"],
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
