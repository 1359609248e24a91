"""Everything that can be known to be wrong before a run starts, said at once.

In two phases, because importing torch takes longer than a user should wait for "unknown key": names, values,
contradictions and files first, and when these are in order, whether each ``_target_`` takes its arguments.
"""

from __future__ import annotations

import errno
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ftlab.config.compose import PRIMARY, Composition, compose, config_loader, hydra_errors, hydra_globals
from ftlab.config.contradictions import contradictions
from ftlab.config.files import missing_inputs, output_problem, unwritable
from ftlab.config.layers import leaves
from ftlab.config.overrides import several_values, text_of
from ftlab.config.resolve import resolve
from ftlab.config.resolvers import claim_folder
from ftlab.config.resume import KEY as RESUME
from ftlab.config.resume import resume_in, resumed_config
from ftlab.config.rules import RULES, rule_for
from ftlab.config.sweeps import extremes, is_ours, wrong_settings, wrong_sweep
from ftlab.config.targets import forbidden, misfits, unnamed
from ftlab.config.unread import unread
from ftlab.errors import ConfigError, ConfigErrors
from ftlab.outputs.folder import claim, held, hold
from ftlab.outputs.sweep import FILE as SWEEP_FILE
from ftlab.outputs.sweep import set_aside
from ftlab.storage.addresses import find_run
from ftlab.storage.checkpoints import Checkpoints
from ftlab.typed import argument, override


def compose_config(
    overrides: Sequence[str] = (), output_dir: str | Path | None = None, extra_dir: Path | None = None
) -> dict[str, Any]:
    """The configuration that ``python train.py <overrides>`` would run, checked, as a plain dict.

    Args:
        output_dir: the run's folder, recorded as ``paths.output_dir``; None leaves what ``overrides`` say.
        extra_dir: a further folder to search for options.

    Raises:
        ConfigErrors: with everything that is wrong.
    """
    composition = compose(overrides, extra_dir=extra_dir)
    config, problems = first_phase(composition)
    _raise(problems)
    _raise(misfits(config))
    if output_dir is not None:
        config["paths"]["output_dir"] = str(output_dir)
    return config


def check_command_line(
    argv: Sequence[str], leads: Callable[[dict[str, Any]], bool] = lambda _: True
) -> dict[str, Any] | None:
    """Check what ``train.py`` was started with, and claim the folder of a single run.

    Flags that only show something (``--help``, ``--cfg``, ``--info``...) are left to Hydra; what ``--cfg`` shows
    need not be runnable, only composable.

    Args:
        leads: tells of a configuration whether its folder is this machine's to make.

    Returns:
        The configuration of a run for which there is nothing for Hydra to do: one that goes on in its folder, or
        whose folder another machine makes.

    Raises:
        ConfigErrors: with everything that is wrong, with all jobs of a sweep.
    """
    flags = get_args_parser().parse_args(list(argv))
    _raise(_misused(flags))
    shows = (flags.help, flags.hydra_help, flags.cfg, flags.info, flags.shell_completion)
    search = {"primary": flags.config_name or PRIMARY, "extra_dir": flags.config_dir}
    if any(shows):
        _raise(compose(flags.overrides, **search).problems if flags.cfg else [])
        return None
    if resume_in(flags.overrides) is not None:
        return _check_resumed(flags, search, leads)
    master = compose(flags.overrides, sweep=True, **search)
    if flags.multirun or master.cfg.hydra.mode == RunMode.MULTIRUN:
        _check_jobs(master, flags.overrides, search)
        return None
    config, problems = first_phase(master)
    problems += map(several_values, master.given.sweeps)
    folder = _output_folder(master.cfg, "run.dir", problems)
    _raise(problems)
    _raise(misfits(config))
    if not leads(config):
        return config
    _claim(folder)
    return None


def _misused(flags: Namespace) -> Iterator[ConfigError]:
    """Flags that Hydra would end with a traceback for, or with another configuration than the one checked here."""
    if flags.config_path is not None:
        problem = "takes the place of conf/, which is what is checked; more options can be had beside it"
        yield ConfigError("--config-path", problem, f"--config-dir {flags.config_path}")
    if flags.config_dir is not None and not os.path.isdir(flags.config_dir):
        yield ConfigError("--config-dir", f"there is no folder {os.path.abspath(flags.config_dir)}")
    if flags.experimental_rerun is not None:
        problem = "runs what a file of Hydra's says, unchecked"
        yield ConfigError("--experimental-rerun", problem, "python -m ftlab reproduce RUN")
    if flags.resolve and not (flags.cfg or flags.help):
        yield ConfigError("--resolve", "is for what --cfg shows", "--cfg job --resolve")
    asked = [flag for flag in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(flags, flag)]
    if len(asked) > 1 and asked != ["multirun", "cfg"]:  # of a sweep, one job's is shown
        yield ConfigError(" ".join(f"--{flag.replace('_', '-')}" for flag in asked), "cannot be had together")


def _claim(folder: str) -> None:
    """Make the folder of a new run and keep every other process from beginning one there."""
    try:
        folder = claim_folder(folder)
        claim(Path(folder))
    except OSError as error:
        _raise([unwritable(Path(folder).absolute(), error.errno or errno.EIO)])
    if (problem := output_problem(folder)) is not None:  # what was begun, and ended, since it was looked at first
        raise ConfigErrors([problem])


def _check_resumed(flags: Namespace, search: dict[str, Any], leads: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The checked configuration of a run that goes on, in its own folder."""
    if flags.multirun:
        problem = "goes on with one run, but -m starts several new ones"
        raise ConfigError("resume", problem, "python train.py -m init_from=RUN ...")
    config, composition = resumed_config(flags.overrides, search)
    _raise(_check_values(config, composition))
    _raise(misfits(config))
    if leads(config):
        run = Path(config["paths"]["output_dir"])
        try:
            hold(run).close()
        except OSError as error:
            problem = f"nothing can be written in {run}: {os.strerror(error.errno or errno.EIO)}"
            raise ConfigError(RESUME, problem, f"{override(RESUME, '/a/copy/of/it')}, or init_from={run}") from error
    return config


def check_job(cfg: DictConfig) -> dict[str, Any]:
    """The plain configuration of the job that Hydra is running, in its folder.

    Values are checked once more: a sweeper that picks them as it goes could not be asked before. A job whose folder
    holds an earlier attempt goes on from its newest checkpoint; an attempt that left none makes room.
    """
    config, problems = resolve(cfg)
    problems += _check_values(config, None)
    _raise(problems)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if (folder / "run.json").exists():
        with held(folder):
            if Checkpoints(folder / "checkpoints").complete():
                return resumed_config([argument(RESUME, str(folder))], {})[0]
            set_aside(folder)
    config["paths"]["output_dir"] = str(folder)
    return config


def first_phase(composition: Composition) -> tuple[dict[str, Any], list[ConfigError]]:
    """All checks that need no torch."""
    with hydra_globals(composition.cfg):
        config, problems = resolve(composition.cfg)
    hydra_node = OmegaConf.to_container(composition.cfg.hydra, resolve=False)
    return config, [
        *composition.problems,
        *problems,
        *_check_values(config, composition),
        *unread(dict(leaves(config)), composition),
        *forbidden(hydra_node, "hydra", for_hydra=True),
    ]


def _check_values(config: dict[str, Any], composition: Composition | None) -> Iterator[ConfigError]:
    values = dict(leaves(config))
    # Mappings where single values belong; where a run goes on from is one.
    values |= {key: value for key, value in _mappings(config) if key in RULES and key != RESUME}
    fine = dict(values)
    for key, value in values.items():
        rule = rule_for(key, composition.default(key) if composition else None)
        problems = list(rule.check(key, value)) if rule else []
        if problems:
            del fine[key]
        for problem in problems:
            yield _with_origin(problem, key, composition)
    yield from contradictions(fine)
    yield from missing_inputs(fine)
    yield from _beginning(fine)
    yield from forbidden(config)
    yield from unnamed(config)


def _mappings(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield f"{prefix}{name}", value
            yield from _mappings(value, f"{prefix}{name}.")


def _beginning(values: dict[str, Any]) -> Iterator[ConfigError]:
    """What is wrong with where a new run begins."""
    if values.get("resume") is not None:
        fix = f"python train.py {override(RESUME, values['resume'])}"
        yield ConfigError(RESUME, "belongs on the command line", fix)
    elif values.get("init_from") is not None and "resume" in values:  # one that goes on has been begun already
        try:
            find_run(values["init_from"], "init_from")
        except ConfigError as error:
            yield error
    elif values.get("init_optimizer") is True and "resume" in values:
        told = "true, but there is no init_from whose optimizer could be taken"
        yield ConfigError("init_optimizer", told, "init_from=RUN init_optimizer=true")


def _with_origin(problem: ConfigError, key: str, composition: Composition | None) -> ConfigError:
    """Say which file set the value, when the user's own command line did not."""
    history = composition.history(key) if composition else []
    if not history or history[-1].where.startswith("command line"):
        return problem
    return ConfigError(problem.key, f"{problem.problem} ({history[-1].where})", problem.fix)


def _output_folder(cfg: DictConfig, key: str, problems: list[ConfigError]) -> str:
    """The folder that ``hydra.<key>`` names; adds to ``problems`` when no run can be written there."""
    try:
        with hydra_globals(cfg), hydra_errors():
            folder = str(OmegaConf.select(cfg.hydra, key, throw_on_missing=True))
    except ConfigErrors as errors:
        if not problems:  # else it is their consequence: the folder's name holds the run's
            problems += errors.problems
        return ""
    if (problem := output_problem(folder)) is not None:
        problems.append(problem)
    return folder


def _check_jobs(master: Composition, overrides: Sequence[str], search: dict[str, Any]) -> None:
    """Check every job of a sweep; a problem that several jobs have is told once, for the first."""
    problems = [*master.problems, *_wrong_engine(master)]
    _raise([problem for problem in problems if problem.key.startswith("hydra.sweeper")])  # else it makes no jobs
    folder = _output_folder(master.cfg, "sweep.dir", problems)
    if os.path.isfile(Path(folder) / SWEEP_FILE) and master.cfg.sweep.resume is None:
        fix = f"{override('sweep.resume', folder)}, to go on with it"
        problems.append(ConfigError("paths.output_dir", f"{folder} already holds a sweep", fix))
    told = {(problem.key, problem.problem) for problem in problems}
    configs: list[dict[str, Any]] = []
    for number, job in enumerate(_jobs(master, overrides, search)):
        composition = compose(job, **search)
        config, found = first_phase(composition)
        configs.append(config)
        for problem in found:
            if (problem.key, problem.problem) not in told:
                told.add((problem.key, problem.problem))
                swept = f"{problem.problem} [job {number}: {' '.join(job)}]"
                problems.append(ConfigError(problem.key, swept, problem.fix))
    _raise(problems)
    _raise({str(problem): problem for config in configs for problem in misfits(config)}.values())


def _wrong_engine(master: Composition) -> Iterator[ConfigError]:
    """What is wrong with the sweeper and the launcher of a sweep."""
    for kind in ("sweeper", "launcher"):
        node = master.cfg.hydra[kind]
        if not isinstance(node, DictConfig):
            yield ConfigError(f"hydra.{kind}", f"must hold a {kind}'s settings, got {node!r}")
            continue
        # What only says again what another key says is told of that key.
        given = OmegaConf.to_container(node, resolve=False)
        assert isinstance(given, dict)
        names = [name for name, value in given.items() if value != f"${{sweep.{name!s}}}"]
        if is_ours(given):
            with hydra_globals(master.cfg), hydra_errors(master.problems):
                settings = OmegaConf.to_container(node, resolve=True)
            assert isinstance(settings, dict)
            yield from wrong_settings(kind, {str(name): settings[name] for name in names})


def _jobs(master: Composition, overrides: Sequence[str], search: dict[str, Any]) -> list[list[str]]:
    """The overrides of each job; where a search chooses the values as it goes, those at the ends of its ranges."""
    sweeper = master.cfg.hydra.sweeper
    typed = [text for text in overrides if not text.lstrip("+~").startswith("hydra.")]
    own = [text for text in overrides if text not in typed]
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    with hydra_errors(master.problems):
        parsed = OverridesParser.create(config_loader(search["extra_dir"])).parse_overrides([*params, *typed])
    searched = "n_trials" in sweeper
    wrong = [wrong_sweep(one, searched=searched) for one in parsed if one.is_sweep_override()]
    if any(wrong):
        _raise([*master.problems, *filter(None, wrong)])
    if not searched:
        [jobs] = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        return [[*own, *job] for job in jobs]
    swept = {one.get_key_element(): extremes(one) for one in parsed if one.is_sweep_override()}
    fixed = [text_of(one) for one in parsed if one.get_key_element() not in swept]
    n_jobs = max(map(len, swept.values()), default=1)
    return [[*own, *fixed, *(ends[i % len(ends)] for ends in swept.values())] for i in range(n_jobs)]


def _raise(problems: Sequence[ConfigError] | Iterator[ConfigError] | Any) -> None:
    found = list(problems)
    if found:
        raise ConfigErrors(found)
