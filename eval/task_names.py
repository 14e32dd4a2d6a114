"""The names of the harness's tasks, groups and tags, and which of its tasks a name stands for.

lm-eval's own index takes ten seconds to read. The names alone stand at the start of a line in the
tasks' files, which are searched in less than one: an unknown name is told before lm-eval, or even a
model, is read, and the whole index is built only where a name, or a group's member, is not local.

    names, manager = find_tasks(EvaluationSettings(tasks=["demo_code"]))
"""

import fnmatch
import functools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from compress.errors import UsageError, did_you_mean, import_package
from compress.eval.settings import EvaluationSettings

if TYPE_CHECKING:  # slow to import
    from lm_eval.tasks import TaskManager

LOCAL_TASKS = Path(__file__).with_name("tasks")

# `task: NAME`, `group: NAME`, `tag: NAME`, and tags as a list below; of a group's members, `- NAME`
# and `- task: NAME`.
NAME = re.compile(r"""^(?:task|group|tag):[ \t]*["']?([^\s"'#\[\]]+)""", re.MULTILINE)
LISTED = re.compile(r"^tag:[ \t]*(\[[^\]]*\]|(?:\s*\n\s*-[ \t]+\S+)+)", re.MULTILINE)
WORD = re.compile(r"""[^\s,"'\[\]-][^\s,"'\[\]]*""")
GROUP = re.compile(r"^group:", re.MULTILINE)
MEMBER = re.compile(r"""^[ \t]*-[ \t]+(?:(?:task|group):[ \t]*)?["']?([^\s"'#:]+)""", re.MULTILINE)


@dataclass(frozen=True)
class KnownNames:
    """What the files of some folders define, and what their groups consist of."""

    defined: frozenset[str]
    members: frozenset[str]

    def match(self, pattern: str) -> bool:
        """Whether a name or a glob pattern stands for something here."""
        return pattern in self.defined or bool(fnmatch.filter(self.defined, pattern))


def task_folders(settings: EvaluationSettings) -> list[Path]:
    """The folder beside this file, and those of `include_path`; UsageError where one is absent."""
    given = settings.include_path
    several = [given] if isinstance(given, str | Path) else (given or [])
    folders = [LOCAL_TASKS, *map(Path, several)]
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"task folder {folder} does not exist (include_path)")
    return folders


def check_names(settings: EvaluationSettings) -> bool:
    """Whether all tasks are local; nothing of lm-eval is imported.

    Raises UsageError: lm-eval is not installed, no task is given, a folder is not there, or a name
    is in no task's file.
    """
    harness = find_spec("lm_eval")
    if harness is None or harness.origin is None:
        import_package("lm_eval", "evaluating tasks")
    tasks = task_list(settings)
    if not tasks:
        raise UsageError("no task to evaluate: name at least one, for example demo_code")
    local = _scan(task_folders(settings))
    outside = [task for task in tasks if not (_is_file(task) or local.match(task))]
    groups = any(local.match(task) for task in tasks) and local.members - local.defined
    if not outside and not groups:
        return True
    assert harness is not None and harness.origin is not None
    shipped = _scan_harness(Path(harness.origin).with_name("tasks"))
    for task in outside:
        if not shipped.match(task):
            near = did_you_mean(task, [*local.defined, *shipped.defined])
            raise UsageError(
                f"unknown task {task!r}{near}: local tasks are "
                f"{', '.join(sorted(local.defined))}; `lm_eval ls tasks` lists the harness's own"
                + _unreadable(task_folders(settings))
            )
    return not outside and not _reach_out(settings, local, shipped)


def find_tasks(
    settings: EvaluationSettings, metadata: dict[str, Any] | None = None
) -> tuple[list[str], "TaskManager"]:
    """The names the harness will run, patterns expanded, and a TaskManager that knows them.

    `metadata` is handed to all tasks, in place of what their definitions say.

    Raises UsageError as `check_names` does.
    """
    local = check_names(settings)
    folders = tuple(task_folders(settings))
    manager = _manager(folders, not local, json.dumps(metadata), _stamp(folders))
    names: list[str] = []
    for task in task_list(settings):
        expanded = [task] if _is_file(task) else manager.match_tasks([task])
        if not expanded:
            raise UsageError(
                f"unknown task {task!r}{did_you_mean(task, manager.all_tasks)}: a file has that "
                "name, but lm-eval cannot read it"
            )
        names += [name for name in expanded if name not in names]
    return names, manager


def task_list(settings: EvaluationSettings) -> list[str]:
    """The tasks as they are named; a bare string is one."""
    return [settings.tasks] if isinstance(settings.tasks, str) else list(settings.tasks)


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml")) and Path(task).is_file()


def _files(folder: Path) -> Iterator[Path]:
    """The task files, and what they include: files of other endings, or none."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (Path(place, name) for name in names if "yaml" in name or "yml" in name)


def _scan(folders: Sequence[Path]) -> KnownNames:
    defined: set[str] = set()
    members: set[str] = set()
    for folder in folders:
        for file in _files(folder):
            try:
                text = file.read_text(encoding="utf-8", errors="replace")
            except OSError:  # lm-eval skips it as well
                continue
            defined.update(NAME.findall(text))
            for tags in LISTED.findall(text):
                defined.update(WORD.findall(tags))
            if GROUP.search(text):
                members.update(MEMBER.findall(text))
    return KnownNames(frozenset(defined), frozenset(members))


def _unreadable(folders: Sequence[Path]) -> str:
    """The first task file that is no YAML, for the end of a message; empty if all are."""
    for file in (file for folder in folders for file in _files(folder)):
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            mark = getattr(error, "problem_mark", None)
            line = "" if mark is None else f" (line {mark.line + 1})"
            return f"; {file} cannot be read as YAML{line}"
    return ""


@functools.lru_cache(maxsize=1)
def _scan_harness(folder: Path) -> KnownNames:
    return _scan([folder])


def _reach_out(settings: EvaluationSettings, local: KnownNames, shipped: KnownNames) -> bool:
    """Whether a file that defines one of the tasks is a group with members of lm-eval's."""
    wanted = task_list(settings)
    for folder in task_folders(settings):
        for file in _files(folder):
            text = file.read_text(encoding="utf-8", errors="replace")
            if not GROUP.search(text):
                continue
            names = NAME.findall(text)
            if not any(fnmatch.filter(names, task) for task in wanted):
                continue
            if ({*MEMBER.findall(text)} - local.defined) & shipped.defined:
                return True
    return False


def _stamp(folders: Sequence[Path]) -> tuple[int, ...]:
    """Changes when a task file of one's own does."""
    return tuple(
        max((file.stat().st_mtime_ns for file in _files(folder)), default=0) for folder in folders
    )


@functools.lru_cache(maxsize=4)
def _manager(
    folders: tuple[Path, ...], defaults: bool, metadata: str, stamp: tuple[int, ...]
) -> "TaskManager":
    """Read once for a model, its baseline, and the check before both."""
    from lm_eval.tasks import TaskManager  # slow to import

    known = json.loads(metadata)
    if defaults:
        return TaskManager(include_path=list(folders), metadata=known)
    return TaskManager(include_path=list(folders), include_defaults=False, metadata=known)
