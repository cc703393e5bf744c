"""Examines a job's nodes before it trains: products, memory, disk, clocks, versions, links."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megascale.comm.gather import gather_json
from megascale.comm.group import interface_mistake, join, open_store
from megascale.errors import UsageError
from megascale.launch.devices import device_index
from megascale.launch.ranks import RankInfo, find_ranks, node_name, slurm_node_of
from megascale.launch.rendezvous import own_addresses
from megascale.limits import own_cores
from megascale.measure.diagnosis import Finding, diagnose, exclude_line
from megascale.measure.health import Health, clock_skew, collective_rates, examine, link_rate, say, tournament

UNFIT = 5


@dataclass(frozen=True)
class Effort:
    """Sizes of the measurements: a product of matrices of `gemm_size`², and megabytes to disk and over a link."""

    gemm_size: int
    disk_mb: int
    link_mb: int


def preflight(out: Path, share: float, timeout: float, effort: Effort) -> NoReturn:
    """Examines this rank's node and, with the others, the links. Writes both reports into `out`, and ends the process with 0 or UNFIT."""
    ranks, began = find_ranks(), time.time()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be made ({error.strerror}): name a folder on the run's file system") from None
    wrong = interface_mistake(os.environ, own_addresses().values()) if ranks.size > 1 else None
    if wrong is not None:
        raise UsageError(f"{wrong} (rank {ranks.rank} on {node_name()})")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", device_index(ranks, torch.cuda.device_count())) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)  # the group's collectives use it
    torch.set_num_threads(max(1, len(own_cores()) // ranks.local_size))
    try:
        store = open_store(ranks, timeout) if ranks.size > 1 else None
    except RuntimeError:
        say(f"error: rank {ranks.rank} on {node_name()} does not reach {ranks.url}, where the ranks meet, within {timeout:g} s")
        if ranks.rank == 1 and not written_since(out, began):
            report(out, ranks, [], [], [(0, slurm_node_of(0, os.environ) or "?")], share)
        leave(UNFIT)
    phases = Phases(ranks, store, timeout)
    health = phases.run("alone", lambda: asdict(examine(ranks, device, out, effort.gemm_size, effort.disk_mb)))
    together: list[dict[str, Any]] = []
    if not phases.missing and ranks.size > 1:
        together = phases.run("together", lambda: with_others(phases, device, effort.link_mb))
    if ranks.rank == 0:
        code = report(out, ranks, [Health(**h) for h in health], together, phases.missing, share)
        phases.end(code)
    else:
        code = phases.wait_for_end()
    leave(code)


class Phases:
    """Phases after each of which rank 0 knows which ranks have reported. They only use the store, where a dead rank blocks nobody."""

    def __init__(self, ranks: RankInfo, store: dist.Store | None, timeout: float) -> None:
        self.ranks, self.store, self.timeout = ranks, store, timeout
        self.missing: list[tuple[int, str]] = []

    def run(self, name: str, work: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
        """All ranks' results on rank 0, only this rank's elsewhere. Afterwards `missing` is the same on all ranks."""
        if self.store is None:
            return [work()]
        self.store.set(f"preflight/node/{self.ranks.rank}", node_name())
        own: dict[str, Any] | None = None
        with suppress(RuntimeError, OSError):  # a rank that fails does not report
            own = work()
            self.store.set(f"preflight/{name}/{self.ranks.rank}", json.dumps(own))
        if self.ranks.rank == 0:
            found = self._collect(name)
            self.store.set(f"preflight/{name}/missing", json.dumps(self.missing))
            return found
        self.missing = [(r, n) for r, n in json.loads(self._get(f"preflight/{name}/missing", 2 * self.timeout) or "[]")]
        return [] if own is None else [own]

    def end(self, code: int) -> None:
        if self.store is not None:
            self.store.set("preflight/end", str(code))
            time.sleep(1.0)  # the store lives in this process

    def wait_for_end(self) -> int:
        return int(self._get("preflight/end", 2 * self.timeout) or UNFIT)

    def _collect(self, name: str) -> list[dict[str, Any]]:
        deadline = time.monotonic() + self.timeout
        texts = {r: self._get(f"preflight/{name}/{r}", deadline - time.monotonic()) for r in range(self.ranks.size)}
        absent = [r for r, text in texts.items() if text is None]
        self.missing = [(r, self._get(f"preflight/node/{r}", 0.0) or slurm_node_of(r, os.environ) or "?") for r in absent]
        return [json.loads(text) for text in texts.values() if text is not None]

    def _get(self, key: str, seconds: float) -> str | None:
        """Waits for the key's value; None if it does not come."""
        assert self.store is not None
        deadline = time.monotonic() + seconds
        with suppress(RuntimeError):
            while not self.store.check([key]):
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.05)
            return self.store.get(key).decode()
        return None


def with_others(phases: Phases, device: torch.device, link_mb: int) -> dict[str, Any]:
    """Clock, links and collectives of this rank. One rank per node takes part in the tournament; on a single node all do."""
    ranks = phases.ranks
    assert phases.store is not None
    join(phases.store, ranks, "nccl" if device.type == "cuda" else "gloo", phases.timeout, device)
    places: list[tuple[int, str]] = [(local, node) for local, node in gather_json([ranks.local_rank, node_name()])]
    single = ranks.one_node
    players = [r for r, (local, _) in enumerate(places) if single or local == 0]
    names = {r: f"rank {r}" if single else places[r][1] for r in players}
    links = []
    for pairs in tournament(len(players)):
        for a, b in ((players[i], players[j]) for i, j in pairs):
            if ranks.rank in (a, b):
                rate = link_rate(b if ranks.rank == a else a, ranks.rank == a, device, link_mb)
                if ranks.rank == a:
                    links.append((names[a], names[b], rate / 1e9))
    return {"node": node_name(), "skew": clock_skew(ranks), "links": links, **collective_rates(ranks, device, link_mb)}


def written_since(out: Path, began: float) -> bool:
    """Whether rank 0 has reported after all: then only this rank's connection to it is broken, and that report says so."""
    time.sleep(3.0)
    with suppress(OSError):
        return (out / "preflight.json").stat().st_mtime > began
    return False


def report(
    out: Path, ranks: RankInfo, health: list[Health], together: list[dict[str, Any]], missing: list[tuple[int, str]], share: float
) -> int:
    """Writes both reports, prints the readable one and returns the exit code."""
    links = {(a, b): rate for t in together for a, b, rate in t["links"]}
    skew = {t["node"]: t["skew"] for t in together}
    findings = diagnose(health, missing, skew, links, share)
    exclude = exclude_line(findings)
    code = UNFIT if any(f.grave for f in findings) else 0
    rates = {k: min(t[k] for t in together) for k in ("all_reduce", "all_gather")} if together else {}
    facts = {
        "ranks": ranks.size,
        "code": code,
        "exclude": exclude,
        "findings": [asdict(f) for f in findings],
        "collectives_gb_per_second": rates,
        "links_gb_per_second": {" – ".join(pair): rate for pair, rate in links.items()},
        "clock_skew_seconds": skew,
        "health": [asdict(h) for h in health],
    }
    text = readable(ranks, health, rates, links, findings, exclude)
    try:
        (out / "preflight.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (out / "preflight.txt").write_text(text, encoding="utf-8")
    except OSError as error:
        say(f"warning: the reports could not be written to {out} ({error.strerror})")
    print(text, end="", flush=True)
    return code


def readable(
    ranks: RankInfo,
    health: list[Health],
    rates: dict[str, float],
    links: dict[tuple[str, str], float],
    findings: list[Finding],
    exclude: str | None,
) -> str:
    """The report as a table of ranks, the extremes of the links, and the findings."""
    lines = [f"{'rank':>5}  {'node':<16}{'GEMM TFLOP/s':>14}{'memory GB/s':>13}{'free GB':>9}{'disk MB/s':>11}"]
    for h in health:
        disk = "" if h.disk_mb_per_second is None else f"{h.disk_mb_per_second:.0f}"
        lines.append(f"{h.rank:>5}  {h.node:<16}{h.gemm_tflops:>14.3f}{h.memory_gb_per_second:>13.1f}{h.free_memory_gb:>9.1f}{disk:>11}")
    if links:
        worst, best = min(links, key=lambda p: links[p]), max(links, key=lambda p: links[p])
        lines.append(f"links: {links[worst]:.3g} GB/s ({' – '.join(worst)}) to {links[best]:.3g} GB/s ({' – '.join(best)})")
    lines += [f"{name.replace('_', '-')} over {ranks.size} ranks: {rate:.3g} GB/s" for name, rate in rates.items()]
    lines += [f"{'unfit' if f.grave else 'note'}: {f.node}: {f.what}" for f in findings]
    if exclude is not None:
        lines.append(f"stay away from them: sbatch {exclude}")
    elif not any(f.grave for f in findings):
        lines.append("all is well" + (", but see the notes" if findings else ""))
    return "\n".join(lines) + "\n"


def leave(code: int) -> NoReturn:
    """Exits at once: destructors could wait for a lost peer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
