"""Scripts from hostile words: nothing in a name, a path or an option may become a command. No SLURM is needed; srun is a stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from megascale.commands import slurm
from megascale.config.load import load_config, read_yaml
from megascale.errors import UsageError
from megascale.launch.pools import Pool, make_pool, read_pool
from megascale.launch.slurm import Container, Job, render

ROOT = Path(__file__).resolve().parents[2]
# Each would make a file PWNED if a shell, or a line of its own, ever read it.
PAYLOADS = (
    'x"\ntouch PWNED\n"',
    "x\ntouch PWNED\n",
    "x\r\ntouch PWNED",
    "$(touch PWNED)",
    "`touch PWNED`",
    "';touch PWNED;'",
    '";touch PWNED;"',
    "x;touch PWNED",
    "x&&touch PWNED",
    "x|touch PWNED",
    "x\\",
    "x\u2028touch PWNED",
    "x\x1b]0;PWNED\x07",
    "a\0b",
    "${IFS}touch${IFS}PWNED",
    "#PWNED",
    "--wrap=touch PWNED",
    "x y",
    "*",
    "%j",
)
FIELDS: dict[str, Callable[[Job, str], Job]] = {
    "run.name": lambda job, text: replace(job, name=text),
    "run.dir": lambda job, text: replace(job, run_dir=f"{job.run_dir}/{text}"),
    "account": lambda job, text: replace(job, account=text),
    "qos": lambda job, text: replace(job, qos=text),
    "exclude": lambda job, text: replace(job, exclude=text),
    "time": lambda job, text: replace(job, time=text),
    "sbatch": lambda job, text: replace(job, directives=(f"--comment={text}",)),
    "partition": lambda job, text: replace(job, pools=(Pool("1", 0, 1, text),)),
    "constraint": lambda job, text: replace(job, pools=(Pool("1", 0, 1, None, text),)),
    "nodes": lambda job, text: replace(job, pools=(make_pool(text, 0, 1),)),
    "pool": lambda job, text: replace(job, pools=(read_pool(f"nodes=1,gpus=0,partition={text}"),)),
    "override": lambda job, text: replace(job, overrides=(f"data.train={text}",)),
    "variant": lambda job, text: replace(job, variants=((text, (f"data.train={text}",)),)),
    "export": lambda job, text: replace(job, exports=(("NOTE", text),)),
    "export name": lambda job, text: replace(job, exports=((text, "1"),)),
    "image": lambda job, text: replace(job, container=Container(text, "pyxis", ())),
    "apptainer": lambda job, text: replace(job, container=Container(f"{text}.sif", "apptainer", (job.workdir,))),
    "mount": lambda job, text: replace(job, container=Container("i", "pyxis", (f"/{text}",))),
    "workdir": lambda job, text: replace(job, workdir=text),
    "python": lambda job, text: replace(job, python=text),
    "config": lambda job, text: replace(job, config=f"{job.workdir}/{text}"),
    "root": lambda job, text: replace(job, root=text),
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the PATH: srun writes its words down, scontrol knows one node, and nobody waits."""
    folder = tmp_path_factory.mktemp("bin")
    scripts = {
        "srun": 'printf "%s\\0" "NOTE=${NOTE:-}" "$@" > "$WORDS"',
        "scontrol": '[ "$2" = hostnames ] && echo n1 || echo "NodeAddr=127.0.0.1 "',
        "sleep": "exit 0",
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def base_job(folder: Path) -> Job:
    work = folder / "work"
    work.mkdir(parents=True)
    (work / "c.yaml").write_text("run: {}\n")
    return Job("llama", str(work / "c.yaml"), str(folder / "runs"), str(ROOT), str(work), "python3", (Pool("1", 0, 1),))


def start(text: str, folder: Path, stand_ins: Path) -> list[str]:
    """Runs a script; the words that reached srun, and NOTE before them."""
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
        "PATH": f"{stand_ins}:{os.environ['PATH']}",
        "WORDS": str(folder / "words"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_ARRAY_TASK_ID": "0",
    }
    (folder / "job.sh").write_text(text)
    subprocess.run(["bash", folder / "job.sh"], cwd=folder / "work", env=env, capture_output=True, timeout=30, check=False)
    words = folder / "words"
    return words.read_bytes().decode().split("\0")[:-1] if words.exists() else []


@pytest.mark.parametrize("field", FIELDS)
def test_no_word_becomes_a_command(tmp_path: Path, stand_ins: Path, field: str) -> None:
    """Catches a value that bash or SLURM reads as more than a value: every one is refused in words or arrives as it was."""
    said: list[str] = []
    for number, payload in enumerate(PAYLOADS):
        folder = tmp_path / str(number)
        job = base_job(folder)
        try:
            text = render(FIELDS[field](job, payload))
        except UsageError as error:
            said.append(str(error))
            continue
        subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=20)
        directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
        # What --sbatch gives is an option as the user wrote it; all others are one value.
        assert field == "sbatch" or all(line.count('"') in (0, 2) and "\\" not in line for line in directives), directives
        options = [word for line in directives for word in without_quotes(line).split()[1:]]
        assert field == "sbatch" or "--wrap=touch" not in options
        arrived = start(text, folder, stand_ins)
        made = [str(path) for path in folder.rglob("*PWNED*") if path.is_file()]
        assert not made, (field, payload)
        if field in ("override", "run.name"):
            wanted = f"data.train={payload}" if field == "override" else f"run.name={payload}"
            assert wanted in arrived, (payload, arrived)
        if field == "export":
            assert arrived[0] == f"NOTE={payload}"
    assert not any(letter in text for text in said for letter in "\n\r\x1b\0"), "a sentence repeats control characters"


def without_quotes(line: str) -> str:
    outside = line.split('"')[::2]
    return "".join(outside)


def test_the_case_of_the_report(tmp_path: Path) -> None:
    """Catches a config whose run.dir runs as shell in the script that --submit hands to SLURM: refused with code 2, and nothing written."""
    config = tmp_path / "c.yaml"
    shipped = (ROOT / "configs" / "llama-1m.yaml").read_text()
    config.write_text(shipped.replace("run:", 'run:\n  dir: "x\\"\\ntouch PWNED\\n\\""', 1))
    command = [sys.executable, "-I", str(ROOT / "launchers/slurm.py"), str(config), "--nodes", "1", "--gpus-per-node", "8", "--submit"]
    command[1:2] = []
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2 and "run.dir is" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("text", ["nodes=1,gpus=²", "nodes=1,gpus=" + "9" * 5000, "nodes=²,gpus=1", "nodes=1,gpus=8,ranks=٣"])
def test_numbers_are_of_digits(text: str) -> None:
    """Catches what Python calls a digit and int() does not read, or SLURM does not, and numbers of 5,000 digits."""
    with pytest.raises(UsageError):
        read_pool(text)


def test_a_task_of_an_array_has_a_name_that_fits(tmp_path: Path) -> None:
    """Catches a run directory that cannot be made when the task's turn comes."""
    with pytest.raises(UsageError, match="more than 255 bytes"):
        render(replace(base_job(tmp_path), variants=(("x" * 255, ()),)))


def test_sites_that_hold_variables_back(tmp_path: Path) -> None:
    """Catches a script whose --export does not reach the ranks: where SLURM_EXPORT_ENV is NONE, or where an image has values of its own."""
    job = replace(base_job(tmp_path), exports=(("NCCL_DEBUG", "WARN"),), torchrun=True)
    wanted = "MASTER_ADDR,MASTER_PORT,OMP_NUM_THREADS,TORCH_ELASTIC_SHUTDOWN_TIMEOUT,NCCL_DEBUG"
    pyxis = render(replace(job, container=Container("image", "pyxis", ())))
    assert "srun --export=ALL " in pyxis and f"--container-env={wanted} " in pyxis
    apptainer = render(replace(job, container=Container("image.sif", "apptainer", ())))
    assert all(f'APPTAINERENV_{name}="${name}" ' in apptainer for name in wanted.split(","))
    assert "srun --export=ALL " in render(job)


def test_a_save_has_its_time(tmp_path: Path) -> None:
    """Catches 30 seconds of torchrun between SIGTERM and SIGKILL, a site's WaitTime, and a cancelled script that asks nobody."""
    plain, torchrun = render(base_job(tmp_path)), render(replace(base_job(tmp_path / "b"), torchrun=True))
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}" in torchrun
    assert "--wait=0 " in plain and "--wait=0 " in torchrun
    assert """trap 'asked=cancel; [ -z "$step" ] || kill -USR1 "$step"' TERM""" in plain
    assert """trap 'asked=cancel; touch "$run_dir/STOP"' TERM""" in torchrun and torchrun.count('rm -f "$run_dir/STOP"') == 2


@pytest.mark.parametrize(("asked", "code"), [(1, "75"), (2, "143")])
def test_mpi_is_asked_gently_once(tmp_path: Path, asked: int, code: str) -> None:
    """Catches ranks that MPI kills a moment after SIGTERM, before they have saved, and a second request that changes nothing."""
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(
        '#!/bin/bash\n[ "$1" != --version ] || { echo Open MPI; exit; }\n'
        'trap "exit 143" TERM\ntrap "saving=yes; echo asked" USR1\necho started\n'
        'for _ in $(seq 200); do sleep 0.05; [ -z "${saving:-}" ] || [ -e "$WAIT" ] || exit 75; done\n'
    )
    mpirun.chmod(0o755)
    if asked == 2:
        (tmp_path / "wait").touch()
    env = {**os.environ, "MPIRUN": str(mpirun), "NPROC": "1", "MASTER_PORT": "23456", "PYTHON": "true", "WAIT": str(tmp_path / "wait")}
    with subprocess.Popen(["bash", ROOT / "launchers" / "mpirun.sh", "c.yaml"], env=env, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None and script.stdout.readline() == "started\n"
        script.terminate()
        assert script.stdout.readline() == "asked\n"
        if asked == 2:
            script.terminate()
        assert str(script.wait(30)) == code


def test_ranks_are_a_number(tmp_path: Path) -> None:
    """Catches a number of ranks that bash computes as an expression, which runs what stands in it."""
    env = {**os.environ, "MPIRUN": "true", "NPROC": "a[$(touch PWNED)]", "PYTHON": "true"}
    script = ["bash", ROOT / "launchers" / "mpirun.sh"]
    done = subprocess.run(script, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2 and "NPROC is" in done.stderr and not list(tmp_path.iterdir())


def test_a_long_array_reads_its_config_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file read again for each of a thousand seeds, which takes minutes."""
    reads = []
    monkeypatch.setattr(slurm, "read_yaml", lambda path: reads.append(path) or read_yaml(path))
    tasks = slurm._variants(ROOT / "configs" / "llama-1m.yaml", (), ",".join(map(str, range(1000))), [])
    assert len(tasks) == 1000 and tasks[999] == ("seed999", ("run.seed=999",)) and len(reads) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/dev/stdin", "--nodes", "1", "--gpus-per-node", "8"], "which the job could not read later"),
        (["configs/llama-1m.yaml", "--nodes", "1", "--gpus-per-node", "9" * 20], "GPUs from 0 .CPUs. to 4096"),
        (["configs/llama-1m.yaml", "--nodes", "1", "--gpus-per-node", "8", "--account", "a\nb"], "--account is 'a\\\\nb'"),
        (["configs/llama-1m.yaml", "--nodes", "1", "--gpus-per-node", "8", "--sbatch", "hello"], "give an option of sbatch"),
        (["configs/llama-1m.yaml", "--nodes", "1", "--gpus-per-node", "8", "--container", "i", "--mount", "/a,b"], "separate its mounts"),
    ],
)
def test_hostile_arguments(monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str) -> None:
    """Catches what passes the command line and fails in the queue."""
    monkeypatch.chdir(ROOT)
    # Whatever stands in for a file here: what is looked at is its name.
    monkeypatch.setattr(slurm, "load_config", lambda _, overrides=(): load_config(ROOT / "configs" / "llama-1m.yaml", overrides))
    with pytest.raises(UsageError, match=words):
        typer.main.get_command(slurm.app).main(arguments, standalone_mode=False)
