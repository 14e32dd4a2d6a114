"""Local paths in what a result says of itself, by names that others know: for what is published.

Where somebody keeps files is for nobody else. The path of the 16-bit model becomes the base model's
id, one in the hub's cache the id of what was downloaded, and any other the bare name of what lies
there. A path is absolute, or begins with `~`, `./` or `../`; in a sentence it has two parts at
least, so that `/no_think` stays, and is no part of an address of the web. A relative path, such as
`texts/own.jsonl`, looks like a name of the hub: it is one where a key says what it is (NAMED) and
it has a file's suffix, more than two parts, or lies here; or where the run or the evaluation that
read it has noted it (NOTED). It is then known wherever it is said.

    names = PublicNames(["/data/tiny"], "maker/tiny")
    names.learn(history)                            # what is a path, wherever it is said
    names.within(history)                           # the same with public names
    names.count                                     # how many were put in

lm-eval names files after the path of a model: `__data__tiny` becomes `maker__tiny`.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from compress.recipe.recipe import shipped_folder

HELD_OUT = " (held out)"  # behind the name of a text that was measured
NOTED = "local"  # the key of what was a file or folder where it was read
# Keys of a model, a text, or a folder: in recipes, modelpress.json, figures, and lm-eval's files.
NAMED = (
    "baseline",
    "dataset",
    "include_path",
    "model",
    "model_name",
    "path",
    "perplexity",
    "perplexity_dataset",
    "pretrained",
)
TEXT_FILES = (".csv", ".json", ".jsonl", ".parquet", ".txt", ".yaml")
# A path from its root on: what may stand before it, and parts without spaces.
PART = r"[^\s\"'`<>|:;,()\[\]{}=\\/]+"
IN_TEXT = re.compile(
    rf"(?<![\w.~/:<>)\]}}*\\-])(?:file://)?(?:~|\.\.?)?(?:/{PART}){{2,}}/?"
    rf"|(?<!\w)[A-Za-z]:(?:[\\/]{PART})+"
)
# A relative path that is known, as a whole.
RELATIVE = r"(?<![\w.~/-]){}(?![\w-]|\.\w)"
CACHED = re.compile(r"[\\/](?:models|datasets)--([^\\/]+?)--([^\\/]+)[\\/]snapshots[\\/][^\\/]+")


def is_local(text: str) -> bool:
    """Whether a text is a path of this machine or another, as a whole."""
    if len(text) > 4096 or "\n" in text:
        return False
    if re.match(r"[A-Za-z]:[\\/]", text) or re.match(r"(~|\.\.?)/", text):
        return True
    parts = [part for part in text.split("/") if part]
    if not text.startswith("/") or text.startswith("//") or not parts:
        return False
    if len(parts) > 1 and not re.search(r"\s", text):
        return True
    return Path("/", parts[0]).exists() and (len(parts) > 1 or Path(text).is_dir())


def is_relative(text: str) -> bool:
    """Whether a model, a text or a folder of this name is a file of this machine or another, and no
    name of the hub or of what ships with modelpress."""
    if not _may_be_relative(text):
        return False
    known = text.endswith(TEXT_FILES) or text.strip("/").count("/") > 1
    return known or Path(text).exists()


def _may_be_relative(text: str) -> bool:
    if "/" not in text or "://" in text or is_local(text) or len(text) > 4096 or "\n" in text:
        return False
    shipped = text.startswith("recipes/") and (shipped_folder().parent / text).exists()
    return not shipped and not Path(text).is_absolute()


def lm_eval_name(path: str) -> str:
    """How lm-eval calls the folder of a model's results."""
    return re.sub(r"[\"<>:/|\\?*\[\]]+", "__", path)


class PublicNames:
    """Public names in the place of local paths.

    Args:
        models: how the 16-bit model is called; relative paths too.
        base_model: its id on the hub; None: nobody knows one.
        public: names that are none of a file, though one lies here.
    """

    def __init__(self, models: Iterable[str], base_model: str | None, public: Collection[str] = ()):
        self.models = [path.rstrip("/\\") for path in models if path]
        self.base_model = base_model if base_model and not is_local(base_model) else None
        self.public = {*public, self.base_model}
        self.known: set[str] = set()
        self.relative: set[str] = set()  # of those that are known
        self.count = 0

    def learn(self, value: Any, key: object = None) -> None:
        """Notes the local paths in a value of this key, or in what it holds."""
        if isinstance(value, Mapping):
            for name, part in value.items():
                self.learn(name)
                self.learn(part, name)
        elif isinstance(value, list | tuple):
            for part in value:
                self.learn(part, key)
        elif isinstance(value, str):
            self._learn_relative(value.removesuffix(HELD_OUT), key)
            text = value.removesuffix(HELD_OUT)
            found = [text] if is_local(text) else [m[0] for m in IN_TEXT.finditer(value)]
            self.known.update(found)

    def _learn_relative(self, text: str, key: object) -> None:
        noted = key == NOTED and _may_be_relative(text)
        if text not in self.public and (noted or (key in NAMED and is_relative(text))):
            self.relative.add(text)
            self.known.add(text)

    def name(self, path: str) -> str:
        """The public name of one local path."""
        if cached := CACHED.search(path):
            below = path[cached.end() :].strip("/\\")
            return Path(below).name or f"{cached[1]}/{cached[2]}"
        bare = path.rstrip("/\\")
        if self.base_model is not None and any(_same(bare, model) for model in self.models):
            return self.base_model
        return PureWindowsPath(bare).name or "local"

    def within(self, value: Any, keep: tuple[str, ...] = ()) -> Any:
        """A value, or what it holds, with public names; entries of the keys `keep` stay."""
        if isinstance(value, Mapping):
            return {
                self.within(key): part if key in keep else self.within(part, keep)
                for key, part in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.within(part, keep) for part in value]
        return self._text(value) if isinstance(value, str) else value

    def _text(self, value: str) -> str:
        text, end = value.removesuffix(HELD_OUT), HELD_OUT * value.endswith(HELD_OUT)
        if is_local(text):
            self.count += 1
            return self.name(text) + end
        for path in sorted(self.known, key=len, reverse=True):
            if path in self.relative:
                value = self._put(RELATIVE.format(re.escape(path)), value)
            elif re.search(r"\s", path):  # which the expression would cut
                value = self._put(re.escape(path) + r"(?![\w-])", value)
        value = IN_TEXT.sub(self._named, value)
        return self.file_name(value)

    def _put(self, pattern: str, text: str) -> str:
        return re.sub(pattern, self._named, text)

    def _named(self, found: re.Match[str]) -> str:
        self.count += 1
        return self.name(found[0].removeprefix("file://"))

    def known_in(self, text: str) -> str:
        """A text that somebody wrote by hand, with public names for the paths that are known."""
        for path in sorted(self.known, key=len, reverse=True):
            whole = RELATIVE.format(re.escape(path)) if path in self.relative else None
            text = self._put(whole or re.escape(path) + r"(?![\w-])", text)
        return text

    def file_name(self, name: str) -> str:
        """The name of a file or folder that lm-eval may have made of a path that is known."""
        for path in sorted(self.known, key=len, reverse=True):
            made = lm_eval_name(path)
            if "__" in made and made in name:
                self.count += 1
                name = name.replace(made, lm_eval_name(self.name(path)))
        return name


def _same(path: str, model: str) -> bool:
    """Whether two paths lead to one folder, as far as their spelling or this machine tells."""
    if path == model or path.endswith(f"/{model.removeprefix('./')}"):
        return True
    try:
        one, other = (Path(p).expanduser() for p in (path, model))
        return one.exists() and one.resolve() == other.resolve()
    except (OSError, RuntimeError):  # no such home, a circle of links
        return False
