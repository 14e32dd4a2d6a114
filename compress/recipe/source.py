"""Where each value of a recipe came from, so that an error can name file, line and field.

YAML is composed once: its nodes give the values and the line of every key. A text that is too
large or too deep, or would be with its aliases written out, is refused before it is composed.
A command-line override replaces a value and its place together. The rest is a translation: what
pydantic says about a value becomes one line that a person can act on.

    source = Source.read(Path("recipe.yaml"))
    source.assign("quantize.bits=4", Recipe)
    source.place(("quantize", "bits"))        # '--set quantize.bits=4'
"""

import json
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml.constructor import ConstructorError

from compress.errors import RecipeError, did_you_mean

Location = tuple[str | int, ...]


# What a recipe may hold. A shipped one has 1 kB, one with a line for each linear of a model 100.
YAML_BYTES = 1_000_000
YAML_NODES = 20_000  # with every alias written out
YAML_DEPTH = 32


class _Loader(yaml.SafeLoader):
    """`SafeLoader`, which tells the line of a value that is not what its tag says."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, ArithmeticError) as error:
            kind = node.tag.rpartition(":")[2]
            problem = f"{_found(node.value)} is no {kind}"
            raise ConstructorError(None, None, problem, node.start_mark) from error


def parse_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """The nodes of a YAML text, and its values.

    Raises yaml.YAMLError if it is none, or more than the limits above; whatever the text, that is
    told within seconds.
    """
    if len(text.encode(errors="replace")) > YAML_BYTES:
        raise yaml.YAMLError(f"expected at most {YAML_BYTES:,} bytes")
    _check_extent(text)
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        return root, None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _check_extent(text: str) -> None:
    """Counts nodes, those behind aliases each time, without building any."""
    sizes: dict[str, int] = {}  # of what an anchor stands for
    open_nodes: list[tuple[str | None, int]] = []  # anchor, nodes before it
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                problem = f"the anchor {event.anchor!r} contains itself"
                raise yaml.MarkedYAMLError(
                    problem=problem, problem_mark=cast("yaml.Mark", event.start_mark)
                )
            count += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.NodeEvent):
            count += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, count - 1))
            elif event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = count - before
        if count > YAML_NODES or len(open_nodes) > YAML_DEPTH:
            limit = f"{YAML_NODES:,} values, aliases written out, and {YAML_DEPTH} levels"
            problem = f"expected at most {limit}"
            raise yaml.MarkedYAMLError(
                problem=problem, problem_mark=cast("yaml.Mark", event.start_mark)
            )


class FieldError(ValueError):
    """A check across fields: raised in a model's validator, it names the field it is about."""

    def __init__(self, field: Location, message: str):
        super().__init__(message)
        self.field = field


class Source:
    """The raw values of a recipe (`data`) and the place of each (`places`: location -> text)."""

    def __init__(self, data: dict[str, Any], places: dict[Location, str]):
        self.data = data
        self.places = places

    @classmethod
    def read(cls, path: Path) -> "Source":
        """Parses a file. Raises RecipeError: unreadable, not YAML, a key twice, not a mapping."""
        try:
            with path.open("rb") as file:
                text = file.read(YAML_BYTES + 1).decode("utf-8-sig")
            root, data = parse_yaml(text)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot be read as UTF-8 text: {error}") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise RecipeError(f"{path}{line}: not valid YAML: {_problem(error)}") from error
        if root is None or not isinstance(data, dict):
            raise RecipeError(f"{path}: expected sections such as `model:`, found {_found(data)}")
        places: dict[Location, str] = {(): str(path)}
        _note_places(root, (), str(path), places, set())
        return cls(data, places)

    def place(self, location: Location) -> str:
        """`FILE:LINE` or the override that gave the value, or its nearest enclosing section."""
        for end in range(len(location), 0, -1):
            if location[:end] in self.places:
                return self.places[location[:end]]
        return self.places[()]

    def in_file(self, location: Location) -> bool:
        """Whether the file gave the value, not the command line."""
        return self.place(location).startswith(self.places[()])

    def assign(self, assignment: str, schema: type[BaseModel]) -> None:
        """Applies one `section.key=value`; the value is YAML."""
        key, equals, text = assignment.partition("=")
        if not equals or not all(key.split(".")):
            raise RecipeError(f"--set {assignment!r}: expected section.key=value")
        try:
            _, value = parse_yaml(text)
        except yaml.YAMLError as error:
            raise RecipeError(
                f"--set {_short(assignment)}: the value is not valid YAML: {_problem(error)}"
            ) from error
        self.put(tuple(key.split(".")), value, f"--set {assignment}", schema)

    def put(
        self, steps: tuple[str, ...], value: object, place: str, schema: type[BaseModel]
    ) -> None:
        """Sets one value; short forms on the way (`model: PATH`) become the mapping they stand for.

        A step into a list is its index: `quantize.overrides.0.bits`.
        """
        node: Any = self.data
        location: Location = ()
        for i, step in enumerate(steps):
            if isinstance(node, list) and not (step.isdigit() and int(step) < len(node)):
                raise RecipeError(
                    f"{place}: {dotted(location)} is a list of {len(node)}: "
                    f"expected an index from 0, found {step!r}"
                )
            key = int(step) if isinstance(node, list) else step
            location = (*location, key)
            if i == len(steps) - 1:
                break
            inner = node[int(step)] if isinstance(node, list) else node.get(key)
            short_form = getattr(section_at(schema, location), "short_form", None)
            if inner is None:
                inner = {}
                self.places[location] = place
            elif isinstance(inner, str) and short_form:
                inner = {short_form: inner}
            elif not isinstance(inner, dict | list):
                raise RecipeError(
                    f"{place}: {dotted(location)} is {_found(inner)}, which has no keys"
                )
            node[key] = inner
            node = inner
        node[key] = value
        # What the file said below this key is gone, and so are its lines.
        size = len(location)
        self.places = {k: v for k, v in self.places.items() if k[:size] != location}
        self.places[location] = place

    def one_line(self, error: ValidationError, schema: type[BaseModel]) -> str:
        """The first of pydantic's complaints as `place: field: what was expected and found`."""
        problems = error.errors(include_url=False)
        first = problems[0]
        location: Location = tuple(first["loc"])
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, FieldError):
            location += cause.field
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        field = f"{dotted(location)}: " if location else ""
        return f"{self.place(location)}: {field}{_explain(first, location, schema)}{more}"


def section_at(schema: type[BaseModel], location: Location) -> type[BaseModel] | None:
    """The class of the section at a location, through `X | None` and `list[X]`; None if none is."""
    section: type[BaseModel] | None = schema
    for step in location:
        if isinstance(step, str):
            field = section.model_fields.get(step) if section else None
            section = _section_in(field.annotation) if field else None
    return section


def dotted(location: Location) -> str:
    """`quantize.overrides[0].bits`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location)
    return text.removeprefix(".")


def _section_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _explain(problem: ErrorDetails, location: Location, schema: type[BaseModel]) -> str:
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        section = section_at(schema, location[:-1])
        known = list(section.model_fields) if section else []
        near = did_you_mean(str(location[-1]), known)
        return f"unknown key{near}: expected one of {', '.join(known)}"
    if kind == "missing":
        return "this key is required and missing"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind in ("model_type", "model_attributes_type"):
        return f"expected a section of `key: value` lines, found {_found(value)}"
    if kind == "bool_type":
        return f"expected true or false, found {_found(value)}"
    expected = problem["msg"].replace("Input should be", "expected", 1)
    return f"{expected}, found {_found(value)}"


def _found(value: object) -> str:
    """A value as YAML would spell it on one line, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:  # an anchor that contains itself
        text = f"a {type(value).__name__} that contains itself"
    return _short(text)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _problem(error: yaml.YAMLError) -> str:
    """What the YAML parser disliked, without its many-line excerpt."""
    parts = [getattr(error, "context", None), getattr(error, "problem", None)]
    return ", ".join(part for part in parts if part) or " ".join(str(error).split())


def _note_places(
    node: yaml.Node, location: Location, file: str, places: dict[Location, str], seen: set[int]
) -> None:
    """Records `FILE:LINE` of every key and list item; refuses a key that is given twice."""
    if id(node) in seen:  # an alias: its lines are the anchor's, and it may contain itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            places[(*location, i)] = f"{file}:{item.start_mark.line + 1}"
            _note_places(item, (*location, i), file, places, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*location, key.value if isinstance(key.value, str) else str(key.value))
            line = key.start_mark.line + 1
            if inner in places:
                raise RecipeError(f"{file}:{line}: {dotted(inner)}: this key is given twice")
            places[inner] = f"{file}:{line}"
            _note_places(value, inner, file, places, seen)
