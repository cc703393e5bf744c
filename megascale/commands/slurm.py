"""Prints the SLURM batch script of a run, or submits it with --submit. Printing needs neither SLURM nor torch."""

from __future__ import annotations

import datetime
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from megascale.cli import ConfigFile, Overrides, check_path, examples, new_app
from megascale.config.load import apply_overrides, build_config, load_config, read_yaml
from megascale.config.schema import Config
from megascale.config.support import check
from megascale.errors import UsageError
from megascale.files import discard
from megascale.launch.pools import Pool, make_pool, read_pool, replicas_over_pools
from megascale.launch.slurm import Container, Job, chain_commands, render, variant_label

app = new_app(__doc__ or "")
PROJECT = Path(__file__).resolve().parents[2]


@app.command(
    epilog=examples(
        "megascale slurm configs/llama-8b.yaml --nodes 4 --gpus-per-node 8 > job.sbatch",
        "megascale slurm configs/llama-8b.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 --preflight --submit",
        "megascale slurm configs/llama-125m.yaml --nodes 1 --gpus-per-node 8 --seeds 1,2,3",
        "megascale slurm configs/llama-1m.yaml --nodes 2 --gpus-per-node 0 --ranks-per-node 4 train.steps=1000",
    )
)
def main(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[str | None, typer.Option(help="number of nodes: 4, or 2-4 for as many as SLURM can allocate")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="0 for CPUs")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="default: one per GPU, 1 on CPUs")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="submit instead of printing")] = False,
    time: Annotated[str | None, typer.Option(help="time limit in SLURM's format; default: the partition's")] = None,
    partition: Annotated[str | None, typer.Option(help="one partition, or several separated by commas")] = None,
    constraint: Annotated[str | None, typer.Option(help="required features of the nodes")] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    exclude: Annotated[str | None, typer.Option(help="nodes to avoid")] = None,
    cpus_per_rank: Annotated[int | None, typer.Option(min=1)] = None,
    pool: Annotated[
        list[str] | None, typer.Option(help="nodes=N,gpus=G[,ranks=R][,partition=P][,constraint=C]; several for unlike nodes in one job")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="1,2,3: an array with a run per seed")] = None,
    each: Annotated[list[str] | None, typer.Option(help="'section.key=value …': a task of an array; may be repeated")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="how many tasks of the array may run together")] = None,
    chain: Annotated[
        int, typer.Option(min=1, help="submit this many jobs in a chain, each continuing where the time of the previous one ended")
    ] = 1,
    signal_seconds: Annotated[int, typer.Option(min=1, max=65535, help="seconds before the time limit at which the ranks save")] = 120,
    max_requeues: Annotated[int, typer.Option(min=0, help="how often the job may be requeued")] = 100,
    max_restarts: Annotated[int, typer.Option(min=0, help="how often ranks may restart in place after a lost peer")] = 5,
    export: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the ranks' environment")] = None,
    setup: Annotated[list[str] | None, typer.Option(help="a shell line before the ranks start, such as `module load cuda`")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="any other #SBATCH option, such as --sbatch=--mem=0")] = None,
    container: Annotated[str | None, typer.Option(help="container image: apptainer if it ends in .sif, otherwise pyxis")] = None,
    mount: Annotated[list[str] | None, typer.Option(help="another folder that the container must see")] = None,
    python: Annotated[str | None, typer.Option(help="the ranks' interpreter; default: this one, or python3 in a container")] = None,
    torchrun: Annotated[bool, typer.Option("--torchrun", help="one torchrun per node instead of one task per rank")] = False,
    preflight: Annotated[bool, typer.Option("--preflight", help="examine the nodes first, and requeue without unfit ones")] = False,
) -> None:
    """Prints the SLURM batch script of a run, or submits it with --submit."""
    for path in (container or "", python or "", *(mount or [])):
        check_path(path)  # quoted in the script, so no shell expands it there
    pools = _pools(nodes, gpus_per_node, ranks_per_node, partition, constraint, pool or [])
    given = load_config(config, overrides or [])
    if config.absolute().parts[1] in ("dev", "proc"):
        raise UsageError(f"the config is {config}, which the job could not read later: give a file")
    placed = (*(overrides or []), *replicas_over_pools(pools, given.parallel), *_on_gpus(pools, given, overrides or []))
    resolved = load_config(config, placed)
    if len(pools) > 1 or "-" not in pools[0].nodes:
        check(resolved, sum(p.least_ranks for p in pools))  # refuse impossible jobs before they wait in a queue
    workdir, run_dir = Path.cwd(), Path(resolved.run_dir).absolute()
    root = project()
    folders = dict.fromkeys(map(str, [*([root] if root else []), workdir, run_dir.parent, *(mount or [])]))
    runtime = "apptainer" if (container or "").endswith(".sif") else "pyxis"
    job = Job(
        name=resolved.run.name,
        config=str(config.absolute()),
        run_dir=str(run_dir),
        root=None if root is None else str(root),
        workdir=str(workdir),
        python=python or ("python3" if container else sys.executable),
        pools=pools,
        overrides=tuple(o for o in placed if not o.startswith(("run.name=", "run.dir="))),
        variants=_variants(config, placed, seeds, each or []),
        at_once=at_once,
        time=time,
        signal_seconds=signal_seconds,
        max_requeues=max_requeues,
        max_restarts=max_restarts,
        cpus_per_rank=cpus_per_rank,
        account=account,
        qos=qos,
        exclude=exclude,
        directives=tuple(sbatch or []),
        exports=tuple(_pair(e) for e in export or []),
        setup=tuple(setup or []),
        container=Container(container, runtime, tuple(folders)) if container else None,
        torchrun=torchrun,
        preflight=preflight,
        chained=chain > 1,
    )
    if submit:
        _submit(job, run_dir / "launch", chain)
    else:
        typer.echo(render(job).encode(), nl=False)  # bash reads bytes, whatever this screen's encoding
        script = run_dir / "launch" / "job.sbatch"
        file, parent = shlex.quote(str(script)), shlex.quote(str(script.parent))
        lines = chain_commands(str(script), chain) if chain > 1 else [f"sbatch {file}"]
        print("\n".join([f"to submit: mkdir -p {parent}, save this as {file}, and", *lines]), file=sys.stderr)


def project() -> Path | None:
    """The checkout's folder (with pretrain.py); None if the package is installed, so that the ranks can import it."""
    return PROJECT if (PROJECT / "pretrain.py").is_file() else None


def _pools(
    nodes: str | None, gpus: int | None, ranks: int | None, partition: str | None, constraint: str | None, texts: list[str]
) -> tuple[Pool, ...]:
    if texts:
        for name, value in (("--nodes", nodes), ("--gpus-per-node", gpus), ("--ranks-per-node", ranks), ("--partition", partition)):
            if value is not None:
                raise UsageError(f"--pool describes its nodes completely, but {name} is {value}: write it into the pools")
        return tuple(read_pool(t) for t in texts)
    for name, value in (("--nodes", nodes), ("--gpus-per-node", gpus)):
        if value is None:
            raise UsageError(f"{name} is missing: give --nodes N --gpus-per-node G (0 for CPUs), or --pool nodes=N,gpus=G several times")
    assert nodes is not None and gpus is not None
    return (make_pool(nodes, gpus, ranks, partition, constraint),)


def _on_gpus(pools: tuple[Pool, ...], config: Config, overrides: list[str]) -> tuple[str, ...]:
    """Requires the requested GPUs: if their driver fails, `auto` would train on CPUs."""
    said = config.run.device != "auto" or any(o.partition("=")[0].strip() == "run.device" for o in overrides)
    return () if said or not all(p.gpus_per_node for p in pools) else ("run.device=cuda",)


def _variants(config: Path, placed: tuple[str, ...], seeds: str | None, each: list[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The tasks of an array, each checked as a separate config."""
    if seeds and each:
        raise UsageError(f"--seeds {seeds} and --each {each[0]!r}: give one of them; --each can set run.seed, too")
    values = read_yaml(config)
    tasks = [(f"run.seed={s.strip()}",) for s in seeds.split(",")] if seeds else [tuple(e.split()) for e in each]
    for task in tasks:
        build_config(apply_overrides(values, [*placed, *task]))
    return tuple((variant_label(task), task) for task in tasks)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--export {text!r}: write NAME=VALUE")
    return key, value


def _submit(job: Job, folder: Path, links: int) -> None:
    """Writes script and config under the run's directory and submits the script, `links` times for a chain."""
    if shutil.which("sbatch") is None:
        raise UsageError(
            "--submit needs sbatch, but it is not on the PATH: run this on a login node, or print the script and copy it there"
        )
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    copy, script = folder / f"submitted-{stamp}.yaml", folder / f"submitted-{stamp}.sbatch"
    text = render(replace(job, config=str(copy)))
    new = [f for f in (folder, *folder.parents) if not f.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(job.config, copy)
        script.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}): choose another run.dir") from None
    before: list[str] = []
    for _ in range(links):
        done = subprocess.run(["sbatch", "--parsable", *before, str(script)], capture_output=True, text=True, check=False)
        if done.returncode:
            said = " ".join(done.stderr.split()) or f"it ended with {done.returncode} and said nothing"
            if before:
                raise UsageError(f"sbatch refused the next job of the chain ({said}): the jobs above stay, with {script}")
            for path in (script, copy):
                discard(path)
            for made in new:
                with suppress(OSError):  # keep anything else that is there
                    made.rmdir()
            raise UsageError(f"sbatch refused the job ({said}): correct what it names; nothing was submitted, and its script is deleted")
        number = done.stdout.strip().split(";")[0]
        print(f"submitted job {number}" + (f", after {before[-1].rsplit(':', 1)[1]}" if before else ""))
        before = ["--kill-on-invalid-dep=yes", f"--dependency=afterok:{number}"]
    print(f"script {script}; logs next to it")
