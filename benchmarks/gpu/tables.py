"""The bring-up's table in docs/gpu.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.steps import STEPS

BEGIN, END = "<!-- bring-up -->", "<!-- end of bring-up -->"


def table(found: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of all steps: device, how each ended, and its main numbers."""
    lines = ["| step | device | ended | seconds | result |", "|---|---|---|---|---|"]
    for step in STEPS:
        record = found.get(step.name)
        if record is None or record["tiny"]:
            lines.append(f"| {step.what} | – | not run | | |")
            continue
        device = f"{record['machine'].get('gpu', 'CPU')}, torch {record['machine'].get('torch', '?')}"
        said = words(record["result"], record["tail"]).replace("|", "/")
        lines.append(f"| {step.what} | {device} | {record['ended']} | {record['seconds']} | {said} |")
    return "\n".join(lines)


def words(result: Any, tail: str) -> str:
    """A result in a few words; of one that is not known, the last line of the output."""
    for key, say in SENTENCES.items():
        if isinstance(result, dict) and key in result:
            return say(result)
    return (tail.strip().splitlines() or [""])[-1][:120]


def _step(r: dict[str, Any]) -> str:
    memory = f", {r['peak_bytes'] / 1e9:.1f} GB" if r.get("peak_bytes") else ""
    waits = ""
    if "host_waits" in r:
        waits = f", host waits at {', '.join(r['host_waits'])}" if r["host_waits"] else ", no host waits"
    launches = f", {r['launches']} launches" if "launches" in r else ""
    return f"{1000 * r['step_seconds']:.0f} ms, MFU {r['mfu']:.2f}{launches}{memory}{waits}"


def _ring(r: dict[str, Any]) -> str:
    return ", ".join(f"{row['length'] // 1024}k: {row['share']:.2f} of one fused call" for row in r["rows"] if "share" in row)


def _operators(r: dict[str, Any]) -> str:
    failed = f"; {', '.join(r['failed'])} failed" if r["failed"] else ""
    return f"{r['passed']} passed, {r['left']} left{failed}"


def _fp8(r: dict[str, Any]) -> str:
    found = []
    for hidden, models in r["by_hidden_size"].items():
        ways = {way: ratio for model in models.values() if isinstance(model, dict) for way, ratio in model["speed_over_bf16"].items()}
        found.append(f"width {hidden}: " + ", ".join(f"{way} {ratio:.2f} × bf16" for way, ratio in ways.items()))
    return "; ".join(found)


def _experts(r: dict[str, Any]) -> str:
    ratios = [f"{what}: {1 / ratio:.2f} of dense" for what, ratio in r["over_dense"].items() if what != "dense"]
    return ", ".join([*ratios, *(f"{ratio:.2f} × {what}" for what, ratio in r["over_mixtral"].items())])


def _peers(r: dict[str, Any]) -> str:
    mfu = f", MFU {r['mfu']:.2f}" if "mfu" in r else ""
    return f"{r['speed_over_huggingface']:.2f} × Hugging Face's tokens/s{mfu}"


def _packing(r: dict[str, Any]) -> str:
    return ", ".join(f"{row['length']}: {row['way']} {1000 * row['seconds']:.1f} ms" for row in r["rows"])


# By a key that only such results have.
SENTENCES: dict[str, Any] = {
    "step_seconds": _step, "passed": _operators, "by_hidden_size": _fp8, "over_dense": _experts, "speed_over_huggingface": _peers,
    "mean_document": _packing, "places": _ring, "copy_terabytes_per_second": lambda r: "in the JSON file",
}  # fmt: skip


def write_tables(found: dict[str, dict[str, Any]], page: Path) -> None:
    """Puts the table between its two marks on the page. Raises ValueError if they are missing."""
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no place for the table: put the lines {BEGIN} and {END} into it")
    before, rest = text.split(BEGIN, 1)
    page.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.split(END, 1)[1]}")
