"""What is sent of a finished folder: its files, and what speaks of them as others may read it.

Card and report are made again under the name of the repository. In them, in modelpress.json,
recipe.yaml, the figures under eval/ and what config files say of their origin, local paths become
names that others know (`public_names`). All of it is written to a folder of its own, with links to
the files that stay as they are: nothing in the source changes.

    outgoing = Outgoing(Path("out"), history, recipe, "me/model")
    with outgoing.folder() as place:                # holds the whole of it until the block is left
        upload(place)
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from compress.pipeline.description import CARD, REPORT, describe, said_by
from compress.pipeline.public_names import PublicNames, is_local
from compress.pipeline.token_sample import may_be_quoted
from compress.storage.files import write_json, write_text
from compress.storage.output_folder import PROVENANCE, files_below

RECIPE = "recipe.yaml"
FIGURES = re.compile(r"eval/(.*/)?[^/]+\.json")
SETTINGS = re.compile(r"(.*_)?config\.json")  # of transformers, GPTQ, and of processors
ORIGIN = re.compile(r".*name_or_path|.*_file")  # their keys that say where something came from
QUOTED = "token_sample"  # an excerpt of a text, in which a path is none of this machine


class Outgoing:
    """A folder as it is sent.

    Attributes:
        names: of local paths, for others; `names.count` says how many were put in.
        files: in which some were.
        unquoted: whether an excerpt of the calibration text is left out: it is somebody's own.
    """

    def __init__(
        self, source: Path, history: Mapping[str, Any], recipe: Mapping[str, Any], repo_id: str
    ):
        self.source, self.repo_id, self.recipe = source, repo_id, recipe
        self.unquoted = QUOTED in history and not may_be_quoted(recipe)
        self.history = {k: v for k, v in history.items() if k != QUOTED or not self.unquoted}
        origins = [part.get("model") for part in (history, recipe)]
        models = [str(of["path"]) for of in origins if isinstance(of, Mapping) and of.get("path")]
        base_model = (history.get("card") or {}).get("base_model")
        self.names = PublicNames(models, base_model, [repo_id])
        self.files: set[str] = set()

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """The folder that is sent: one that is gone afterwards, or, where all stays as it is, the
        source."""
        own = [  # hidden files stay at home
            file for file in files_below(self.source) if not re.search(r"(^|/)\.", file)
        ]
        contents = {
            file: content
            for file in own
            if (FIGURES.fullmatch(file) or SETTINGS.fullmatch(file))
            and (content := _parsed(self.source / file)) is not None
        }
        with TemporaryDirectory(prefix="modelpress-push-") as made:
            place = Path(made)
            self._learn(contents)
            for file, content in contents.items():
                self._write_json(place, file, content)
            self._write_documents(place)
            renamed = {file: self.names.file_name(file) for file in own}
            if not files_below(place) and all(file == name for file, name in renamed.items()):
                yield self.source
                return
            for file, name in renamed.items():
                if not (place / name).exists():
                    (place / name).parent.mkdir(parents=True, exist_ok=True)
                    _link((self.source / file).resolve(), place / name)
            yield place

    def _learn(self, contents: Mapping[str, Any]) -> None:
        self.names.learn([{k: v for k, v in self.history.items() if k != QUOTED}, self.recipe])
        for file, content in contents.items():
            if FIGURES.fullmatch(file):
                self.names.learn(content)

    def _write_json(self, place: Path, file: str, content: Any) -> None:
        """A file of figures or of settings, if it names a local path."""
        before = self.names.count
        figures = FIGURES.fullmatch(file)
        public = self.names.within(content) if figures else self._settings(content)
        if self.names.count > before:
            self.files.add(file)
            target = place / self.names.file_name(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, json.dumps(public, indent=2, ensure_ascii=False) + "\n")

    def _settings(self, value: Any) -> Any:
        """Settings, with public names where they say what they were made of: the rest is text of
        the model's own, such as a template."""
        if not isinstance(value, Mapping):
            return value
        return {
            key: self.names.within(part)
            if ORIGIN.fullmatch(str(key)) and isinstance(part, str) and self._is_local(part)
            else self._settings(part)
            for key, part in value.items()
        }

    def _is_local(self, text: str) -> bool:
        return is_local(text) or text in self.names.relative

    def _write_documents(self, place: Path) -> None:
        """recipe.yaml, and card, report and modelpress.json of a folder that has the last."""
        recipe = self._within(RECIPE, self.recipe)
        if RECIPE in self.files:
            text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
            write_text(place / RECIPE, text)
        described = (self.source / PROVENANCE).is_file()
        if described:
            # The report shows pictures, which it reads from where they are.
            history = self._within(PROVENANCE, self.history, (QUOTED, "pictures"))
            with said_by(self.source / PROVENANCE):
                history = describe(place, self.source, history, self.repo_id, recipe or None)
            if {RECIPE, PROVENANCE} & self.files:
                self.files |= {name for name in (CARD, REPORT) if (place / name).is_file()}
            history = self._within(PROVENANCE, history, (QUOTED,))
            files = {*history.get("files", []), *files_below(place), PROVENANCE}
            write_json(place / PROVENANCE, history | {"files": sorted(files)})
        if not (place / CARD).is_file() and (self.source / CARD).is_file():  # edited by hand
            before = self.names.count
            text = self.names.known_in((self.source / CARD).read_text(encoding="utf-8"))
            if self.names.count > before:
                self.files.add(CARD)
                write_text(place / CARD, text)

    def _within(self, file: str, content: Any, keep: tuple[str, ...] = ()) -> Any:
        before = self.names.count
        public = self.names.within(content, keep)
        if self.names.count > before:
            self.files.add(file)
        return public


def _parsed(file: Path) -> Any:
    """The JSON in a file; None where it is none, which nothing is found in."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def _link(file: Path, place: Path) -> None:
    """`place` as another name of a file: its bytes may be many."""
    try:
        place.symlink_to(file)
    except OSError:  # a system that lets nobody make such links
        os.link(file, place)
