"""Runs commands as users type them, in a scratch clone: tools in this process, training on forked ranks."""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from deepspeed.launcher import runner as deepspeed_launcher
from torch.distributed import run as torchrun

from megagpt.checkpoint.format import read_manifest, resolve_checkpoint
from megagpt.commands import find_learning_rate, job, pretrain
from megagpt.config import Config, load_config, to_json
from megagpt.data.tokenizer import load_tokenizer
from megagpt.errors import MegagptError
from megagpt.schedules.registry import chunks_per_rank
from support.commands import ROOT
from support.job import Job
from support.scratch_clone import SMALL_MODEL, enter, stand_ins

MAX_RANKS = 8
TASKS_PER_NODE = 8
SMALL_RUN = (
    *SMALL_MODEL,
    "training.tokens=null",
    "training.epochs=null",
    "training.batch_ramp=null",
    "training.micro_batch_size=1",
    "evaluation.micro_batch_size=null",
    "evaluation.samples=2",
    "evaluation.test_samples=2",
    "lr_schedule.warmup_steps=0",
    "lr_schedule.decay_steps=null",
    "logging.interval=1",
)
SMALL_ENCODER = ("model.encoder_layers=2", "model.encoder_positions=64", "model.head_dim=null")
SMALLER = {
    "train_tokenizer": ["--vocab-size", "400"],
    "find_learning_rate": ["--steps", "30"],
    "generate_text": ["--device", "cpu", "--max-tokens", "10"],
    "benchmark_cluster": ["--size", "64", "--mebibytes", "1"],
    "evaluate": ["--device", "cpu"],
}
"""Arguments that make a tool's work small, and possible without a GPU; they override those before them."""
ON_RANKS = ("pretrain", "pretrain_t5", "find_learning_rate")


Run = tuple[str, int, str]
"""A run that has been made: module, ranks, and config without its data."""


class RanksCommand(NamedTuple):
    """A command of megagpt on a number of ranks."""

    ranks: int
    module: str
    arguments: list[str]


class Result(NamedTuple):
    """How a command ended."""

    code: int
    output: str


class CommandRunner:
    """Runs commands in a clone, in the current process where possible. Fails with the command and its output."""

    def __init__(self, scratch: Path, trained: set[Run]) -> None:
        self.scratch = scratch
        self.environment = stand_ins(scratch / "bin")
        self.trained = trained
        self.runs: set[Path] = set()
        """Folders of runs that commands of this executor have started."""

    def run(self, command: str) -> None:
        """Run a command, which must succeed."""
        line, _, redirected = command.partition(" > ")
        program, *arguments = self._words(line)
        if program in ("bash", "sbatch"):
            self._train(self._script(program, arguments, command), command)
        elif program in ("mkdir", "cp"):
            if program == "cp":
                shutil.rmtree(arguments[-1], ignore_errors=True)
            subprocess.run(["bash", "-c", command], check=True)
        else:
            ranks = self._interpreted(program, arguments, command)
            if ranks.module in ON_RANKS and not {"--print-config", "--dry-run"} & set(ranks.arguments):
                self._train(ranks, command)
                return
            self._remove_outputs(ranks.arguments)
            result = self._call_on(ranks._replace(arguments=[*ranks.arguments, *smaller(ranks.module, ranks.arguments)]))
            assert result.code == 0, f"{command}\n{result.output}"
            if redirected:
                Path(redirected).write_text(result.output)

    def try_to(self, command: str) -> Result:
        """Run a command as it is, which may fail; return its exit code and output."""
        program, *arguments = self._words(command)
        ranks = self._interpreted(program, arguments, command)
        if ranks.ranks == 1 and ranks.module == "pretrain":  # a run of full size must not start here
            args = pretrain.create_parser().parse_args(ranks.arguments)
            with pytest.raises(MegagptError):
                job.checked_config(args.config, args.set, 1)
        return self._call_on(ranks)

    def _call_on(self, ranks: RanksCommand) -> Result:
        """Run a command on its ranks, in this process if there is one."""
        if ranks.ranks == 1:
            return call(ranks.module, ranks.arguments)
        processes = Job(ranks.ranks, ranks.arguments, self.scratch / "logs", enter_here(), ranks.module)
        return Result(max(code or 0 for code in processes.finish(timeout=300)), processes.output())

    def _interpreted(self, program: str, arguments: list[str], command: str) -> RanksCommand:
        """Return the command of megagpt that a program starts."""
        if program in ("deepspeed", "torchrun"):
            return launched(program, arguments)
        if program == "mpirun":
            own = self._interpreted("python", arguments[arguments.index("python") + 1 :], command)
            return own._replace(ranks=int(arguments[arguments.index("-n") + 1]))
        if program.startswith("megagpt-"):
            return RanksCommand(1, program.removeprefix("megagpt-").replace("-", "_"), arguments)
        if program == "python" and arguments[:2] == ["-m", "megagpt"]:
            return RanksCommand(1, arguments[2], arguments[3:])
        if program == "python" and arguments[0] == "-m":
            return RanksCommand(1, arguments[1].removeprefix("megagpt.commands."), arguments[2:])
        if program == "python" and Path(arguments[0]).is_file():
            return RanksCommand(1, module_of(arguments[0]), arguments[1:])
        raise AssertionError(f"{command}: is neither executed by this test nor listed in NOT_RUN")

    def _words(self, line: str) -> list[str]:
        """Return the words of a command after expansion by the shell, without variables before it."""
        shell = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
        words = shell.stdout.split("\0")[:-1]
        return list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, words))

    def _remove_outputs(self, arguments: list[str]) -> None:
        """Remove the results of an earlier command that this one writes again."""
        for flag in ("--output", "--output-prefix"):
            if flag in arguments:
                output = Path(arguments[arguments.index(flag) + 1])
                for path in output.parent.glob(f"{output.name}[._]*"):
                    path.unlink()
                if output.is_dir():
                    shutil.rmtree(output)
                output.unlink(missing_ok=True)

    def _script(self, program: str, arguments: list[str], command: str) -> RanksCommand:
        """Run a script with recording programs in the place of launchers; return what it has started."""
        nodes, environment = 1, self.environment
        if program == "sbatch":
            options = list(iter_options(arguments))
            nodes = int(dict(option.removeprefix("--").split("=", 1) for option in options).get("nodes", 4))
            arguments = arguments[len(options) :]
            environment = environment | {
                "SLURM_JOB_ID": "1234",
                "SLURM_JOB_NODELIST": "node[1-2]",
                "SLURM_NNODES": str(nodes),
                "SLURM_JOB_NUM_NODES": str(nodes),
                "SLURM_NTASKS": str(nodes * TASKS_PER_NODE),
                "SLURM_SUBMIT_DIR": str(Path.cwd()),
            }
        script = subprocess.run(["bash", *arguments], env=environment, capture_output=True, text=True, check=False)
        assert script.returncode == 0, f"{command}\n{script.stdout}{script.stderr}"
        calls = [json.loads(line) for line in (self.scratch / "bin" / "calls").read_text().splitlines()]
        (self.scratch / "bin" / "calls").unlink()
        ((launcher, *words),) = [started for started in calls if "pretrain_gpt.py" in (Path(word).name for word in started)]
        if Path(launcher).name == "srun":
            return RanksCommand(nodes * TASKS_PER_NODE, "pretrain", words[words.index("pretrain_gpt.py") + 1 :])
        return launched(Path(launcher).name, words)

    def _train(self, ranks: RanksCommand, command: str) -> None:
        """Check the config as printed, then run the command on a small model."""
        args = importlib.import_module(f"megagpt.commands.{ranks.module}").create_parser().parse_args(ranks.arguments)
        config = job.checked_config(args.config, own_overrides(ranks.module, args), ranks.ranks)
        self._forget_older_run(config)
        world = ranks_to_run(config, ranks.ranks)
        small = small_run(config, world)
        run = what_runs(load_config(args.config, [*own_overrides(ranks.module, args), *small]))
        if (ranks.module, world, run) in self.trained:
            return
        self.trained.add((ranks.module, world, run))
        arguments = [*ranks.arguments, *smaller(ranks.module, ranks.arguments), "--set", *small]
        processes = Job(world, arguments, self.scratch / "logs", enter_here(), ranks.module)
        codes = processes.finish(timeout=300)
        assert codes == [0] * world, f"{command}\n{codes}\n{processes.output()}"

    def _forget_older_run(self, config: Config) -> None:
        """Remove the stand-in for an older run where a run of another model starts."""
        if config.checkpoint.dir is None or config.checkpoint.dir.startswith("runs/quickstart"):
            return
        run = Path(config.checkpoint.dir).parent
        if run not in self.runs:
            shutil.rmtree(run, ignore_errors=True)
        self.runs.add(run)


def call(module: str, arguments: list[str]) -> Result:
    """Call the main function of a command in this process."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = importlib.import_module(f"megagpt.commands.{module}").main(arguments)
        except SystemExit as error:
            code = int(error.code or 0)
    return Result(code, output.getvalue())


def enter_here() -> Callable[[int], None]:
    """Return what the ranks of a job do before their work: they change to the folder that is the current one now."""
    return partial(enter, str(Path.cwd()))


def launched(launcher: str, words: list[str]) -> RanksCommand:
    """Return what a launcher starts, read by its own parser."""
    if launcher == "deepspeed":
        args = deepspeed_launcher.parse_args(words)
        if args.module:
            assert args.user_script == "megagpt"
            return RanksCommand(args.num_gpus, args.user_args[0], args.user_args[1:])
        return RanksCommand(args.num_gpus * max(args.num_nodes, 1), module_of(args.user_script), args.user_args)
    args = torchrun.parse_args(words)
    nodes = int(str(args.nnodes).split(":")[0])
    script = args.training_script
    if args.module:
        assert script == "megagpt"
        return RanksCommand(int(args.nproc_per_node) * nodes, args.training_script_args[0], args.training_script_args[1:])
    module = script.removeprefix("megagpt-").replace("-", "_") if args.no_python else module_of(script)
    return RanksCommand(int(args.nproc_per_node) * nodes, module, args.training_script_args)


def module_of(script: str) -> str:
    """Return the module of megagpt.commands that a script runs."""
    assert (ROOT / script).is_file(), script
    return "pretrain" if Path(script).name == "pretrain_gpt.py" else Path(script).stem


def smaller(module: str, arguments: list[str]) -> list[str]:
    """Return arguments that make a tool's work small."""
    few = ["--max-documents", "4"] if module == "evaluate" and "--data" in arguments else []
    return [*SMALLER.get(module, []), *few]


def own_overrides(module: str, args: argparse.Namespace) -> list[str]:
    """Return the overrides with which a command loads its config."""
    if module == "find_learning_rate":
        return [*find_learning_rate.OVERRIDES, *args.set, f"training.steps={args.steps}"]
    return list(args.set)


def what_runs(config: Config) -> str:
    """Return what distinguishes a run from others. Its data do not: `checked_config` has checked them."""
    tree = json.loads(to_json(config))
    del tree["data"], tree["model"]["vocab_size"]
    return json.dumps(tree)


def ranks_to_run(config: Config, ranks: int) -> int:
    """Return how many of the ranks to run: those of one replica of the model, at least 2 if there are more."""
    replica = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    assert replica <= MAX_RANKS, f"a layout of {replica} ranks is too large to run here"
    return min(ranks, max(replica, 2))


def small_run(config: Config, world: int) -> list[str]:
    """Return overrides that make a run small, in its own layout: two steps beyond the checkpoint that it resumes from.

    There are as many micro-batches as stages: a collective of 8 ranks takes 30 ms here.
    """
    parallel, checkpoints = config.parallel, config.checkpoint
    stages = parallel.pipeline * chunks_per_rank(parallel.schedule, parallel.virtual_stages)
    data = max(1, world // (parallel.tensor * parallel.pipeline * parallel.context))
    step = 0
    if checkpoints.dir and checkpoints.resume == "auto" and Path(checkpoints.dir, "latest").exists():
        step = read_manifest(resolve_checkpoint(checkpoints.dir)).step
    small = [
        *SMALL_RUN,
        *(SMALL_ENCODER if config.model.encoder_layers else ()),
        f"model.n_layer={max(2, stages)}",
        f"training.global_batch_size={data * parallel.pipeline}",
        f"training.steps={step + 2}",
    ]
    if config.data.tokenizer is not None:
        sentinels = config.data.span_corruption.sentinels if config.model.encoder_layers else 0
        small.append(f"model.vocab_size={load_tokenizer(config.data.tokenizer).vocab_size + sentinels}")
    return small


def iter_options(words: list[str]) -> Iterator[str]:
    """Yield the options before a script."""
    for word in words:
        if not word.startswith("--"):
            return
        yield word
