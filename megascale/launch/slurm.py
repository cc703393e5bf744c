"""SLURM batch scripts as text: a pure function from plain data. The script is meant to be read, and does not need this package."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from megascale.config.bounds import path_mistake
from megascale.errors import UsageError
from megascale.launch.pools import Pool
from megascale.launch.rendezvous import FIRST_PORT, PORTS
from megascale.launch.words import check_line_words, check_mounts, check_sbatch_words, check_shell_words, quoted

SCRIPTS = {"train": "pretrain.py", "preflight": "launchers/preflight.py"}
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
SAVE_SECONDS = 600  # seconds between SIGTERM and SIGKILL under torchrun, whose default is 30


@dataclass(frozen=True)
class Container:
    """An image and its runtime: pyxis (srun's own flags) or apptainer. `mounts`: folders it must see."""

    image: str
    runtime: str
    mounts: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """Everything in a script. Paths are absolute; overrides are section.key=value.

    root      the project's folder; None if the package is installed for `python`
    variants  an array: (label, overrides) of every task, each with its own run directory
    chained   a link of a chain succeeds at the time limit, so that the next one starts; otherwise the job requeues itself
    """

    name: str
    config: str
    run_dir: str
    root: str | None
    workdir: str
    python: str
    pools: tuple[Pool, ...]
    overrides: tuple[str, ...] = ()
    variants: tuple[tuple[str, tuple[str, ...]], ...] = ()
    at_once: int | None = None
    time: str | None = None
    signal_seconds: int = 120
    max_requeues: int = 100
    max_restarts: int = 5
    cpus_per_rank: int | None = None
    account: str | None = None
    qos: str | None = None
    exclude: str | None = None
    directives: tuple[str, ...] = ()
    exports: tuple[tuple[str, str], ...] = ()
    setup: tuple[str, ...] = ()
    container: Container | None = None
    torchrun: bool = False
    preflight: bool = False
    chained: bool = False


def check_job(job: Job) -> None:
    """Refuses what SLURM would refuse later or misinterpret."""
    _check_words(job)
    if job.time is not None and not re.fullmatch(r"[0-9]+|([0-9]+-)?[0-9]{1,2}(:[0-9]{1,2}){0,2}|[0-9]+:[0-9]{2}(:[0-9]{2})?", job.time):
        raise UsageError(f"--time is {job.time!r}: minutes, hours:minutes:seconds or days-hours:minutes are needed")
    if len(job.pools) > 1 and job.variants:
        raise UsageError("--pool several times makes a heterogeneous job, and SLURM has no arrays of those: submit the variants one by one")
    if len(job.pools) > 1 and job.torchrun:
        raise UsageError("--torchrun and several pools: torchrun starts equally many ranks on all nodes; leave out --torchrun")
    labels = [label for label, _ in job.variants]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UsageError(f"two tasks of the array would share the run directory {job.run_dir}-{twice}: give every one its own overrides")
    for label in labels:
        wrong = path_mistake(f"{job.run_dir}-{label}")
        if wrong is not None:
            raise UsageError(f"a task of the array would write to {job.run_dir}-{label[:40]}…: {wrong}; give it shorter overrides")
    for key, _ in job.exports:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise UsageError(f"--export {key!r}: write NAME=VALUE with a name that a shell can hold")


def _check_words(job: Job) -> None:
    """Checks every text in the script, according to its quoting there."""
    pools = [w for p in job.pools for w in (("--nodes", p.nodes), ("--partition", p.partition), ("--constraint", p.constraint))]
    check_sbatch_words([("run.name", job.name), ("run.dir", job.run_dir), ("--account", job.account), ("--qos", job.qos), *pools])
    check_sbatch_words([("--exclude", job.exclude), ("--time", job.time)])
    check_line_words([("--sbatch", d) for d in job.directives])
    for directive in job.directives:
        if not directive.startswith("-"):
            raise UsageError(f"--sbatch is {directive!r}: give an option of sbatch, as --sbatch=--mem=0")
    check_line_words([("the config's path", job.config), ("this project's folder", job.root or ""), ("--python", job.python)])
    check_line_words([("this folder", job.workdir), *(("--export", key) for key, _ in job.exports)])
    check_shell_words([("--export", value) for _, value in job.exports] + [("--setup", line) for line in job.setup])
    check_shell_words([("an override", o) for o in (*job.overrides, *(o for _, words in job.variants for o in words))])
    check_line_words([("a task of the array", label) for label, _ in job.variants])
    if job.container is not None:
        check_line_words([("--container", job.container.image), *(("--mount", m) for m in job.container.mounts)])
        check_mounts(job.container.mounts)


def render(job: Job) -> str:
    """The script. Raises UsageError for an impossible job."""
    check_job(job)
    parts = [_header(job), _settings(job), _BEGIN, _MEETING, _traps(job), _preflight(job), _loop(job), _end(job)]
    return "\n".join(part.strip("\n") + "\n" for part in parts if part)


def variant_label(overrides: tuple[str, ...]) -> str:
    """ "run.seed=3 optim.lr=1e-3" → "seed3-lr1e-3", for names of directories."""
    words = []
    for item in overrides:
        key, _, value = item.partition("=")
        words.append(re.sub(r"[^A-Za-z0-9._-]+", "_", key.rsplit(".", 1)[-1] + value).strip("_"))
    return "-".join(words)


def chain_commands(script: str, links: int) -> list[str]:
    """Shell lines that submit `links` jobs, each waiting for the success of the previous one."""
    lines = [f"job=$(sbatch --parsable {shlex.quote(script)})"]
    again = f'job=$(sbatch --parsable --kill-on-invalid-dep=yes --dependency="afterok:${{job%%;*}}" {shlex.quote(script)})'
    return lines + [again] * (links - 1)


def _header(job: Job) -> str:
    nodes = " + ".join(f"{p.nodes} nodes of {f'{p.gpus_per_node} GPUs' if p.gpus_per_node else 'CPUs'}" for p in job.pools)
    log = "%x-%A_%a.log" if job.variants else "%x-%j.log"
    common = [
        f"--job-name={quoted(job.name)}",
        *([f"--account={quoted(job.account)}"] if job.account else []),
        *([f"--qos={quoted(job.qos)}"] if job.qos else []),
        *([f"--exclude={quoted(job.exclude)}"] if job.exclude else []),
        *([f"--time={job.time}"] if job.time else []),
        *([f"--array=0-{len(job.variants) - 1}" + (f"%{job.at_once}" if job.at_once else "")] if job.variants else []),
        "--requeue",
        "--open-mode=append",
        f"--signal=B:USR1@{job.signal_seconds}",
        f"--output={quoted(job.run_dir.replace('%', '%%') + f'/launch/{log}')}",
        *job.directives,
    ]
    lines = [
        "#!/usr/bin/env bash",
        f"# {job.name}: {nodes}. Written by launchers/slurm.py; submit it with sbatch, read it, change it.",
        "# SLURM brings the job back after preemption and lost nodes (requeue), into the same log (append).",
        f"# USR1, {job.signal_seconds} s before the time limit: the ranks save and leave, and the job goes on from there.",
        *(f"#SBATCH {item}" for item in [*common, *_pool_directives(job, job.pools[0])]),
    ]
    for pool in job.pools[1:]:
        lines += ["#SBATCH hetjob", *(f"#SBATCH {item}" for item in _pool_directives(job, pool))]
    return "\n".join(lines)


def _pool_directives(job: Job, pool: Pool) -> list[str]:
    tasks = 1 if job.torchrun else pool.ranks_per_node
    cpus = (job.cpus_per_rank or 1) * pool.ranks_per_node // tasks
    if "-" in pool.nodes:
        # Given tasks, SLURM allocates the fewest nodes for the fewest tasks; given CPUs, as many nodes as it can.
        room = [f"--mincpus={cpus * tasks}"]
    else:
        room = [f"--ntasks-per-node={tasks}", *([f"--cpus-per-task={cpus}"] if job.cpus_per_rank else [])]
    return [
        *([f"--partition={quoted(pool.partition)}"] if pool.partition else []),
        *([f"--constraint={quoted(pool.constraint)}"] if pool.constraint else []),
        f"--nodes={pool.nodes}",
        *room,
        *([f"--gpus-per-node={pool.gpus_per_node}"] if pool.gpus_per_node else []),
    ]


def _settings(job: Job) -> str:
    lines = [
        *job.setup,  # before `set -u`, under which the scripts of many clusters fail
        "set -u -o pipefail",
        "",
        *([f"root={shlex.quote(job.root)}"] if job.root is not None else []),
        f"python={shlex.quote(job.python)}",
        f"config={shlex.quote(job.config)}",
        f"run_dir={shlex.quote(job.run_dir)}",
        f"max_requeues={job.max_requeues}  # how often the job may come back, for whatever reason",
        f"max_restarts={job.max_restarts}  # how often the ranks may start again in place after a lost peer",
        "overrides=(",
        *(f"  {shlex.quote(o)}" for o in (f"run.name={job.name}", *job.overrides)),
        ")",
    ]
    if job.variants:
        lines.append("case $SLURM_ARRAY_TASK_ID in")
        for i, (label, overrides) in enumerate(job.variants):
            words = " ".join(shlex.quote(o) for o in (f"run.name={job.name}-{label}", *overrides))
            lines.append(f"  {i}) run_dir={shlex.quote(f'{job.run_dir}-{label}')}; overrides+=({words}) ;;")
        lines += ['  *) echo "the array has no task $SLURM_ARRAY_TASK_ID"; exit 2 ;;', "esac"]
    lines.append('overrides+=("run.dir=$run_dir")')
    lists = [f"$SLURM_JOB_NODELIST_HET_GROUP_{i}" for i in range(len(job.pools))] if len(job.pools) > 1 else ["$SLURM_JOB_NODELIST"]
    lines.append(f'nodes="{",".join(lists)}"')
    lines += [f"export {key}={shlex.quote(value)}" for key, value in job.exports]
    if job.torchrun:
        lines.append("export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # torchrun would set it itself, with a warning")
        lines.append(f"export {SHUTDOWN}=${{{SHUTDOWN}:-{SAVE_SECONDS}}}  # for a save between SIGTERM and SIGKILL")
    lines += [f"cd {shlex.quote(job.workdir)} || exit 2  # paths in the config start here"]
    return "\n".join(lines)


_BEGIN = """
say() { echo "$(date '+%F %T') $*"; }
say "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, nodes $nodes"
if [ "${SLURM_RESTART_COUNT:-0}" -gt "$max_requeues" ]; then
  say "came back ${SLURM_RESTART_COUNT} times, and max_requeues is $max_requeues: giving up"
  exit 1
fi

# What runs, kept beside the run: this script, and the config as it was at the first start, so that an edit does not reach a requeued job.
mkdir -p "$run_dir/launch" || exit 2
cp "$0" "$run_dir/launch/$SLURM_JOB_ID.sbatch"
[ -e "$run_dir/launch/$SLURM_JOB_ID.yaml" ] || cp "$config" "$run_dir/launch/$SLURM_JOB_ID.yaml" || exit 2
config=$run_dir/launch/$SLURM_JOB_ID.yaml
"""

_MEETING = f"""
# The ranks meet on the first node, where this script runs, under the address that SLURM itself uses: its names need not resolve. The port
# comes from the job's number, below those that kernels give to outgoing connections; one that somebody listens on is passed over.
head=$(scontrol show hostnames "$nodes" | head -n 1)
address=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
export MASTER_ADDR=${{address:-$head}}
export MASTER_PORT=$(({FIRST_PORT} + SLURM_JOB_ID % {PORTS}))
next_port() {{
  MASTER_PORT=$(({FIRST_PORT} + (MASTER_PORT - {FIRST_PORT} + 1) % {PORTS}))
}}
taken() {{ (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; }}
"""


def _traps(job: Job) -> str:
    ask = 'touch "$run_dir/STOP"' if job.torchrun else '[ -z "$step" ] || kill -USR1 "$step"'
    why = (
        "# torchrun does not pass USR1 on to its ranks; a file STOP asks them as well."
        if job.torchrun
        else "# srun passes USR1 on to its tasks."
    )
    # Ignore an older request of a job that was killed before it could remove its file.
    stale = '\nrm -f "$run_dir/STOP"' if job.torchrun else ""
    return f"""
{why}{stale}
asked=""  # why the ranks were asked to stop: limit, or cancel
step=""   # the process of srun
trap 'asked=${{asked:-limit}}; say "the time limit is near: the ranks are asked to save"; {ask}' USR1
trap 'asked=cancel; {ask}' TERM
"""


def _loop(job: Job) -> str:
    forget = '\nrm -f "$run_dir/STOP"' if job.torchrun else ""
    return f"""
restarts=0
code=75
while [ -z "$asked" ]; do
  while taken; do next_port; done
  rm -f "$run_dir/exit.json"
{_srun(job, f'{_program(job, "train")} "$config" "${{overrides[@]}}"')} &
  step=$!
  [ -z "$asked" ] || kill -USR1 "$step"  # asked while it was being started
  # In the background, since bash runs traps only between commands; a trap ends the wait before srun has ended.
  wait "$step"; code=$?
  while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
  step=""
  # srun tells the code of one task, which may be one that was killed because another had failed; the run itself says why it ended.
  told=$(sed -n 's/^{{"code": \\([0-9]*\\),.*/\\1/p' "$run_dir/exit.json" 2>/dev/null)
  code=${{told:-$code}}
  say "ended with code $code: $(cat "$run_dir/exit.json" 2>/dev/null)"
  # Only a lost peer (5) or a killed rank (128 and more) is worth another try in place.
  if [ -n "$asked" ] || {{ [ "$code" -ne 5 ] && [ "$code" -le 128 ]; }} || [ "$restarts" -ge "$max_restarts" ]; then break; fi
  restarts=$((restarts + 1))
  say "starting again in $((10 * restarts)) s, time $restarts of $max_restarts"
  next_port
  sleep $((10 * restarts)) & wait $!
done{forget}
"""


def _preflight(job: Job) -> str:
    if not job.preflight:
        return ""
    return f"""
# The nodes are examined first. Unfit ones are named, and the job goes back to the queue to come again without them.
preflight_seconds=120  # until a rank that has not reported counts as lost
while taken; do next_port; done
{_srun(job, f'{_program(job, "preflight")} --out "$run_dir/launch" --timeout "$preflight_seconds"', kill=False)} &
step=$!
wait "$step"; code=$?
step=""
if [ "$code" -ne 0 ] && [ -z "$asked" ]; then
  unfit=$(sed -n 's/^ "exclude": "--exclude=\\(.*\\)",$/\\1/p' "$run_dir/launch/preflight.json" 2>/dev/null)
  say "preflight ended with code $code, unfit: ${{unfit:-unknown, see above}}"
  [ -n "$unfit" ] || exit "$code"
  before=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*ExcNodeList=\\([^ ]*\\).*/\\1/p' | sed 's/(null)//')
  # SLURM takes the change only once the job waits again, and ends this script while it does.
  (trap '' TERM; scontrol requeue "$SLURM_JOB_ID"; scontrol update jobid="$SLURM_JOB_ID" ExcNodeList="${{before:+$before,}}$unfit")
  sleep 300 & wait $!
fi
next_port
"""


def _program(job: Job, command: str) -> str:
    """The program for python: a script of the project, or a command of the installed package."""
    if job.root is None:
        return f"-m megascale {command}"
    return f'"$root/{SCRIPTS[command]}"'


def _srun(job: Job, program: str, kill: bool = True) -> str:
    """The command that starts the ranks, a block of neighbours per node, without the line's end.

    kill  whether a failing rank ends the others, too
    """
    # Set explicitly, since sites have other defaults: SLURM_EXPORT_ENV=NONE would drop what is exported above, and a WaitTime would kill
    # ranks that still write when the first one has ended.
    flags = ["--export=ALL", "--wait=0", f"--kill-on-bad-exit={int(kill)}", "--distribution=block"]
    names = ["MASTER_ADDR", "MASTER_PORT", *(["OMP_NUM_THREADS", SHUTDOWN] if job.torchrun else []), *(key for key, _ in job.exports)]
    before = ""
    if job.container is not None and job.container.runtime == "pyxis":
        flags.append(f"--container-env={','.join(dict.fromkeys(names))}")  # otherwise the image's own values win
        mounts = ",".join(f"{m}:{m}" for m in job.container.mounts)
        flags += [f"--container-image={job.container.image}", f"--container-mounts={mounts}", f"--container-workdir={job.workdir}"]
    inside: list[str] = []
    if job.container is not None and job.container.runtime == "apptainer":
        before = "".join(f'APPTAINERENV_{name}="${name}" ' for name in dict.fromkeys(names))  # the same
        inside = ["apptainer", "exec", *(["--nv"] if job.pools[0].gpus_per_node else [])]
        inside += [*(w for m in job.container.mounts for w in ("--bind", m)), "--pwd", job.workdir, job.container.image]
    shared = " ".join(map(shlex.quote, flags))  # repeated for every part of a heterogeneous job
    command = f'"$python" {program}'
    enter = " ".join(map(shlex.quote, inside)) + " " if inside else ""
    blocks = []
    for i, pool in enumerate(job.pools):
        tasks = 1 if job.torchrun else pool.ranks_per_node
        count = f"SLURM_JOB_NUM_NODES_HET_GROUP_{i}" if len(job.pools) > 1 else "SLURM_JOB_NUM_NODES"
        where = f'{f"--het-group={i} " if len(job.pools) > 1 else ""}--nodes="${count}" --ntasks="$(({count} * {tasks}))"'
        where += f" --ntasks-per-node={tasks}"
        if job.cpus_per_rank:  # srun does not inherit it from sbatch
            where += f" --cpus-per-task={job.cpus_per_rank * pool.ranks_per_node // tasks}"
        blocks.append(f"{shared} \\\n    {where} \\\n    {enter}{_torchrun(pool, program) if job.torchrun else command}")
    return f"  {before}srun " + " : \\\n    ".join(blocks)


def _torchrun(pool: Pool, program: str) -> str:
    """One agent per node. Each knows the rendezvous, so none has to identify itself by its host name."""
    agent = (
        'exec "$0" -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" '
        f'--master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --nproc-per-node {pool.ranks_per_node} "$@"'
    )
    return f"bash -c '{agent}' \\\n    " + f'"$python" {program}'


def _end(job: Job) -> str:
    if job.chained:
        again = """    say "this link of the chain ends here, the next one goes on"
    exit 0"""
    else:
        again = """    say "requeued"
    scontrol requeue "$SLURM_JOB_ID" && sleep 300 & wait $!"""
    return f"""
# Only the time limit's signal makes the job come back by itself: a cancelled one has saved, too, and must stay away.
preempted() {{ scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'; }}
if [ "$asked" = limit ]; then
  if [ "$code" -eq 75 ] || [ "$code" -eq 5 ] || [ "$code" -gt 128 ]; then
{again}
  fi
elif [ "$code" -eq 75 ]; then
  # Preempted: SLURM requeues the job itself when the grace time is over. To end before would look like a failure.
  for _ in $(seq 900); do preempted || break; sleep 1; done
fi
exit "$code"
"""
