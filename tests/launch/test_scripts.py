"""Rendered scripts: golden files, bash's own check, what is refused; where replicas stand in unlike pools."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megascale.commands import slurm
from megascale.config.schema import Parallel
from megascale.errors import UsageError
from megascale.launch.pools import Pool, make_pool, read_pool, replicas_over_pools
from megascale.launch.slurm import Container, Job, chain_commands, render, variant_label

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
BASE = Job(
    name="llama",
    config="/home/me/llama.yaml",
    run_dir="/scratch/runs/llama",
    root="/home/me/megascale",
    workdir="/home/me",
    python="/home/me/megascale/.venv/bin/python",
    pools=(Pool("2", 8, 8),),
    time="24:00:00",
)
APPTAINER = Container("/images/torch.sif", "apptainer", ("/home/me", "/scratch"))
JOBS = {
    "plain": BASE,
    "options": replace(
        BASE,
        run_dir="/scratch/my runs/llama",
        pools=(Pool("2-4", 4, 4, "a100,h100", "ib"),),
        overrides=("parallel.tp=2", "data.train=[{path: a b, weight: 1}]"),
        cpus_per_rank=12,
        account="lab",
        qos="long",
        exclude="n[7-9]",
        directives=("--mem=0", "--exclusive"),
        exports=(("NCCL_DEBUG", "WARN"), ("NOTE", "it's $HOME")),
        setup=("module load cuda", "ulimit -l unlimited"),
        container=Container("nvcr.io#nvidia/pytorch:26.01", "pyxis", ("/home/me", "/scratch")),
        chained=True,
    ),
    "array": replace(BASE, variants=(("seed1", ("run.seed=1",)), ("seed2-lr1e-3", ("run.seed=2", "optim.lr=1e-3"))), at_once=1),
    "pools": replace(BASE, pools=(Pool("2", 8, 8, "a100"), Pool("1", 4, 4, "v100")), cpus_per_rank=4, container=APPTAINER),
    "torchrun": replace(BASE, torchrun=True, cpus_per_rank=6),
    "preflight": replace(BASE, preflight=True),
}


@pytest.mark.parametrize("name", JOBS)
def test_golden(name: str) -> None:
    """Catches any change of a script that nobody meant. UPDATE_GOLDEN=1 writes the files anew, to be read in the diff."""
    file, text = GOLDEN / f"{name}.sbatch", render(JOBS[name])
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("name", JOBS)
def test_bash_reads_it(name: str) -> None:
    """Catches a quote too few."""
    subprocess.run(["bash", "-n"], input=render(JOBS[name]), text=True, check=True, timeout=20)


@pytest.mark.parametrize("script", sorted((ROOT / "launchers").glob("*.sh")), ids=lambda p: p.name)
def test_bash_reads_the_launchers(script: Path) -> None:
    """Catches a launcher that cannot even be started."""
    subprocess.run(["bash", "-n", script], check=True, timeout=20)
    assert os.access(script, os.X_OK)


def bash(text: str, **env: str) -> str:
    done = subprocess.run(["bash", "-c", text], env={**os.environ, **env}, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout


def settings_of(job: Job, **env: str) -> list[str]:
    """The overrides that the script hands to pretrain.py, as bash reads them."""
    text = render(job)
    begin, end = text.index("root="), text.index("cd /home/me")
    return bash(text[begin:end] + '\nprintf "%s\\n" "${overrides[@]}"', SLURM_JOB_NODELIST="n1", **env).splitlines()


def test_words_arrive_whole() -> None:
    """Catches overrides and exports that the shell splits or expands."""
    assert settings_of(JOBS["options"]) == [
        "run.name=llama",
        "parallel.tp=2",
        "data.train=[{path: a b, weight: 1}]",
        "run.dir=/scratch/my runs/llama",
    ]
    text = render(JOBS["options"])
    line = next(line for line in text.splitlines() if line.startswith("export NOTE"))
    assert bash(f'{line}; printf %s "$NOTE"') == "it's $HOME"


def test_tasks_of_an_array() -> None:
    """Catches tasks that share a name or a directory."""
    assert settings_of(JOBS["array"], SLURM_ARRAY_TASK_ID="1") == [
        "run.name=llama",
        "run.name=llama-seed2-lr1e-3",
        "run.seed=2",
        "optim.lr=1e-3",
        "run.dir=/scratch/runs/llama-seed2-lr1e-3",
    ]
    assert "has no task 2" in settings_of(JOBS["array"], SLURM_ARRAY_TASK_ID="2")[0]
    assert variant_label(("run.seed=3", "data.train=[a b/c]")) == "seed3-train_a_b_c"


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (replace(BASE, time="a day"), "--time is 'a day'"),
        (replace(BASE, pools=(Pool("1", 1, 1),) * 2, variants=(("a", ()),)), "no arrays of those"),
        (replace(BASE, pools=(Pool("1", 1, 1),) * 2, torchrun=True), "leave out --torchrun"),
        (replace(BASE, variants=(("a", ()), ("a", ()))), "/scratch/runs/llama-a"),
        (replace(BASE, exports=(("A-B", "1"),)), "--export 'A-B'"),
    ],
)
def test_what_slurm_would_refuse(job: Job, words: str) -> None:
    """Catches a mistake that would wait in a queue first."""
    with pytest.raises(UsageError, match=words):
        render(job)


def test_pools_are_read() -> None:
    """Catches ranks that do not follow the GPUs, and slips in --pool."""
    assert read_pool("nodes=2,gpus=8,partition=a100,constraint=ib") == Pool("2", 8, 8, "a100", "ib")
    assert make_pool("2-4", 0, None) == Pool("2-4", 0, 1) and make_pool("1", 0, 4).least_ranks == 4
    for text, words in (("nodes=2", "gpus= is missing"), ("nodes=2,gpu=8", "'gpu=8'"), ("nodes=2,gpus=x", "gpus is 'x'")):
        with pytest.raises(UsageError, match=words):
            read_pool(text)
    for nodes, gpus, ranks, words in (
        ("0", 1, None, "--nodes is '0'"),
        ("4-2", 1, None, "4-2"),
        ("1", 2, 4, "at most 2"),
        ("1", -1, None, "GPUs"),
    ):
        with pytest.raises(UsageError, match=words):
            make_pool(nodes, gpus, ranks)


@pytest.mark.parametrize(
    ("ranks", "parallel", "expected"),
    [
        ((16,), {}, ()),
        ((8, 8), {}, (2, 8)),
        ((16, 8), {}, (3, 8)),
        ((16, 8), {"tp": 4}, (3, 2)),
        ((12, 8), {"tp": 2, "dp_shard": 2}, (5, 2)),
        ((8, 8), {"pp": 2}, (1, 8)),
        ((8, 8), {"dp_replicate": 2}, (2, 8)),
        ((8, 6), {"tp": 4}, "does not divide their common divisor 2"),
        ((8, 4), {"dp_shard": 8}, "would cross the link"),
        ((8, 8), {"dp_replicate": 4}, "parallel.dp_replicate is 4, .* hold 2 replicas"),
        ((8, 8), {"pp": 3}, "no multiple of parallel.pp 3"),
    ],
)
def test_replicas_stay_in_their_pool(ranks: tuple[int, ...], parallel: dict[str, Any], expected: tuple[int, int] | str) -> None:
    """Catches shards or tensor cuts whose messages cross the slow link."""
    pools = tuple(Pool("1", n, n) for n in ranks)
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            replicas_over_pools(pools, Parallel(**parallel))
        return
    found = replicas_over_pools(pools, Parallel(**parallel))
    assert found == ((f"parallel.dp_replicate={expected[0]}", f"parallel.dp_shard={expected[1]}") if expected else ())
    if len(pools) > 1:
        with pytest.raises(UsageError, match="fixed numbers"):
            replicas_over_pools((*pools, Pool("1-2", 8, 8)), Parallel(**parallel))


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    env = {n: v for n, v in os.environ.items() if n != "PATH"}
    command = [sys.executable, "launchers/slurm.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env={**env, "PATH": "/nowhere"}, capture_output=True, text=True, timeout=60, check=False)


def test_a_screen_without_the_letters(tmp_path: Path) -> None:
    """Catches a traceback for a letter that the screen's encoding does not have, and a script whose paths lose theirs."""
    out, env = tmp_path / "é" / "r", {**os.environ, "PYTHONIOENCODING": "ascii"}

    def said(*words: object) -> tuple[bytes, bytes]:
        done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=env, capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    script, after = said("launchers/slurm.py", "configs/llama-1m.yaml", "--nodes", 1, "--gpus-per-node", 0, f"run.dir={out}")
    assert f"run_dir='{out}'".encode() in script and rb"\xe9/r/launch" in after
    plan, _ = said("pretrain.py", "configs/llama-1m.yaml", "--dry-run", "--show-config", "model.vocab_size=99", f"run.dir={out}")
    assert rb"\xe9/r" in plan


def test_printing_needs_no_slurm(tmp_path: Path) -> None:
    """Catches a printed script with anything else in it, and files written by mere printing."""
    out = tmp_path / "runs" / "r"
    done = launch("configs/llama-1m.yaml", "--nodes", 2, "--gpus-per-node", 0, "--ranks-per-node", 4, f"run.dir={out}", "optim.lr=1e-3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/usr/bin/env bash\n") and done.stdout.endswith('exit "$code"\n')
    assert "\n#SBATCH --ntasks-per-node=4\n" in done.stdout and "--gpus" not in done.stdout and "\n  optim.lr=1e-3\n" in done.stdout
    assert f"sbatch {out}/launch/job.sbatch" in done.stderr and not out.exists()
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True, timeout=20)


@pytest.mark.parametrize(
    ("gpus", "more", "expected"),
    [
        (8, [], ["run.device=cuda"]),
        (8, ["run.device=auto"], ["run.device=auto"]),
        (8, ["run.device=cpu"], ["run.device=cpu"]),
        (0, [], []),
    ],
)
def test_gpus_that_are_asked_for_are_used(gpus: int, more: list[str], expected: list[str]) -> None:
    """Catches a job on GPUs whose driver does not work, and which trains on CPUs in silence."""
    done = launch("configs/llama-1m.yaml", "--nodes", 1, "--gpus-per-node", gpus, *more)
    assert done.returncode == 0, done.stderr
    assert [line.strip() for line in done.stdout.splitlines() if line.startswith("  run.device=")] == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus-per-node", 8], "--nodes is missing"),
        (["--nodes", 2], "--gpus-per-node is missing"),
        (["--nodes", 2, "--gpus-per-node", 8, "parallel.tp=3"], "parallel.tp"),
        (["--nodes", 2, "--gpus-per-node", 8, "optim.learning_rate=1"], "optim.lr"),
        (["--nodes", 2, "--gpus-per-node", 8, "--submit"], "needs sbatch"),
        (["--nodes", 2, "--pool", "nodes=1,gpus=1"], "--nodes is 2"),
        (["--nodes", 2, "--gpus-per-node", 8, "--seeds", "1,x"], "run.seed is 'x'"),
        (["--nodes", 2, "--gpus-per-node", 8, "--seeds", "1", "--each", "optim.lr=1"], "give one of them"),
        (["--nodes", 2, "--gpus-per-node", 8, "--export", "A"], "NAME=VALUE"),
        (["--nodes", 2, "--gpus-per-node", 8, "--container", "$NO_SUCH_VARIABLE/a.sif"], "variables are not expanded here"),
        (["--nodes", 2, "--gpus-per-node", 8, "run.dir=$NO_SUCH_VARIABLE/a"], "run.dir is '$NO_SUCH_VARIABLE/a'"),
    ],
)
def test_refused_before_the_queue(arguments: list[object], words: str) -> None:
    """Catches a traceback, another exit code than 2, and a job that fails hours later when its turn comes."""
    done = launch("configs/llama-1m.yaml", *arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("refused", [1, 2])
def test_what_sbatch_refuses_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    """Catches scripts named "submitted" of jobs that SLURM never took, and the loss of one that it has taken."""
    (tmp_path / "llama.yaml").write_text("run: {name: a}")
    job = replace(BASE, config=str(tmp_path / "llama.yaml"), run_dir=str(tmp_path / "run"))
    calls: list[list[str]] = []

    def sbatch(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if len(calls) == refused:
            return subprocess.CompletedProcess(
                command, 1, "", "sbatch: error: invalid partition\nsbatch: error: Batch job submission failed\n"
            )
        return subprocess.CompletedProcess(command, 0, "7\n", "")

    monkeypatch.setattr("megascale.commands.slurm.shutil.which", lambda name: name)
    monkeypatch.setattr("megascale.commands.slurm.subprocess.run", sbatch)
    with pytest.raises(UsageError, match=r"sbatch refused .*error: invalid partition sbatch: error: Batch job"):
        slurm._submit(job, tmp_path / "run" / "launch", 2)
    left = [p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert sorted(left) == ([] if refused == 1 else [".sbatch", ".yaml"]) and (tmp_path / "run").exists() == (refused == 2)


def test_chain_commands() -> None:
    """Catches links that do not wait for each other."""
    script = "\n".join(['sbatch() { echo "$@" >> "$LOG"; echo "7;cluster"; }', *chain_commands("/a b/job.sbatch", 3)])
    assert bash(f'LOG=$(mktemp); {script}; cat "$LOG"').splitlines() == [
        "--parsable /a b/job.sbatch",
        *["--parsable --kill-on-invalid-dep=yes --dependency=afterok:7 /a b/job.sbatch"] * 2,
    ]
