"""Compiles tiles.cpp, quads.cpp and rounding.cpp for this machine: products at memory speed.

The first call on a CPU looks for a C++ compiler ($CXX, g++, clang++, c++), compiles once (some
seconds) with -march=native, and keeps the library in the user's cache; later processes load it.
Where there is none, torch's operators run, which are slower, and a warning says so once
(products.py).
MODELPRESS_NATIVE=0 keeps the compiler out of it; MODELPRESS_CPU=avx2 or generic compiles for less
than this x86-64 processor has (no AVX-512, or its first instructions alone), never for more.

    library = kernels()                # None: `reason()` says why
    y = library.tiles_matmul(x, packed, scale, zero, bits=4, group_size=128)

    y = operators().tiles_matmul(x, packed, scale, zero, bias, 4, 128)

Products are operators of torch (operators.cpp), where its headers lie beside it, and are called by
address elsewhere. Threads are OpenMP's, the same ones as torch's: its library of that name is in
the process already.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from compress.kernels.cpu.level import LEVELS, cpu_level
from compress.kernels.user_cache import cache_directory, check_file

HERE = Path(__file__).parent
SOURCES = (HERE / "tiles.cpp", HERE / "quads.cpp", HERE / "rounding.cpp")
HEADERS = (HERE / "vectors.h",)
OPERATORS = HERE / "operators.cpp"
TORCH = Path(torch.__file__).parent
TORCH_FLAGS = (
    f"-I{TORCH / 'include'}",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # of the stable interface: 2.11's
    f"-L{TORCH / 'lib'}",
    "-ltorch_cpu",
    f"-Wl,-rpath,{TORCH / 'lib'}",
)
FLAGS = (
    "-O3",
    "-std=c++17",
    # Products and sums may fuse: fewer roundings, and what the figures in the docs were taken with.
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
)
OPENMP = () if sys.platform == "darwin" else ("-fopenmp",)
COMPILE_SECONDS = 120
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in vectors.h
TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int, "f": ctypes.c_float}
# What each compiled function takes, in letters of TYPES.
SIGNATURES = {
    "tiles_matmul": "pip ppip p llll iii",
    "quads_matmul": "ppp ppip p llll iii",
    "round_tokens": "pi ll ff pp i",
    "best_scale": "ppp pp lll ff ii",
    "round_in_order": "ppp pp lll i",
}
BASELINE = "x86-64's first instructions"  # of tiles.cpp
TILE = 64  # outputs
LANES = 16  # outputs that lie next to each other in a tile
QUAD = 4  # inputs


@dataclass(frozen=True)
class Kernels:
    """The compiled library, and products by it; tensors lie on the CPU."""

    library: ctypes.CDLL

    def instructions(self) -> str:
        """What of this processor products are compiled for, in words."""
        self.library.modelpress_instructions.restype = ctypes.c_char_p
        return str(self.library.modelpress_instructions().decode())

    def takes_bf16(self) -> bool:
        """Whether this processor multiplies bf16; if not, bf16 is widened to fp32."""
        return bool(self.library.modelpress_takes_bf16())

    def tiles_matmul(
        self,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bits: int,
        group_size: int | None,
    ) -> Tensor:
        """x [M, K] times the weight's transpose: fp32 [M, N]. Layout: head of tiles.cpp."""
        (M, K), N = x.shape, scale.shape[1]
        require(packed.shape == (-(-N // TILE), -(-K // 2), LANES * bits), "codes in tiles")
        require((group_size or 2) % 2 == 0, "pairs of inputs in a group")
        _check_weight(packed, scale, zero, -(-K // (group_size or K)))
        if x.dtype != torch.bfloat16 or not self.takes_bf16():
            x = x.float()
        x = x.contiguous()
        each = 1 if x.dtype == torch.bfloat16 else 2  # words of a row for two inputs
        work = torch.empty(M * -(-K // 2) * each, dtype=torch.int32, device="cpu")
        y = torch.empty(M, N, dtype=torch.float32, device="cpu")
        self.library.modelpress_tiles_matmul(
            x.data_ptr(),
            KINDS[x.dtype],
            work.data_ptr(),
            *_addresses(packed, scale, zero),
            y.data_ptr(),
            M,
            N,
            K,
            group_size or K,
            bits,
            2 ** (bits - 1),
            torch.get_num_threads(),
        )
        return y

    def takes_quads(self) -> bool:
        """Whether this processor multiplies bytes: by VNNI, AVX2 or ARM's dot product."""
        return bool(self.library.modelpress_takes_quads())

    def quads_matmul(
        self,
        values: Tensor,
        token_scale: Tensor,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bits: int,
        group_size: int | None,
        middle: int,
    ) -> Tensor:
        """values int8 [M, K] times the weight's transpose: fp32 [M, N]. Layout: head of quads.cpp.

        bits: of a code as it is stored; middle: the zero point where there is no `zero`.
        """
        (M, K), (G, N) = values.shape, scale.shape
        steps = -(-K // QUAD)
        require(packed.shape == (-(-N // TILE), steps, 2 * LANES * bits), "codes in quads")
        require((group_size or QUAD) % QUAD == 0, "fours of inputs in a group")
        _check_weight(packed, scale, zero, -(-K // (group_size or K)))
        require(values.dtype == torch.int8 and values.is_contiguous(), "int8 rows")
        require(token_scale.dtype == torch.float32 and token_scale.shape == (M,), "token scales")
        require(token_scale.is_contiguous(), "token scales side by side")
        work = torch.empty(M * (steps + G), dtype=torch.int32, device="cpu")
        y = torch.empty(M, N, dtype=torch.float32, device="cpu")
        self.library.modelpress_quads_matmul(
            values.data_ptr(),
            token_scale.data_ptr(),
            work.data_ptr(),
            *_addresses(packed, scale, zero),
            y.data_ptr(),
            M,
            N,
            K,
            group_size or K,
            bits,
            middle,
            torch.get_num_threads(),
        )
        return y

    def round_tokens(self, x: Tensor, steps: float, half: int) -> tuple[Tensor, Tensor]:
        """x [M, K] as int8 [M, K] in [-half, half), and each row's scale: its largest / steps."""
        M, K = x.shape
        x = x.contiguous()
        values, scale = (
            torch.empty(M, K, dtype=torch.int8, device="cpu"),
            torch.empty(M, device="cpu"),
        )
        self.library.modelpress_round_tokens(
            x.data_ptr(),
            KINDS[x.dtype],
            M,
            K,
            steps,
            half,
            values.data_ptr(),
            scale.data_ptr(),
            torch.get_num_threads(),
        )
        return values, scale


def _addresses(packed: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[int | None, ...]:
    """Where codes, scales and zero points lie, and what scales are, as both products take them."""
    zeros = None if zero is None else zero.data_ptr()
    return packed.data_ptr(), scale.data_ptr(), KINDS[scale.dtype], zeros


def _check_weight(packed: Tensor, scale: Tensor, zero: Tensor | None, groups: int) -> None:
    require(packed.dtype == torch.uint8 and packed.is_contiguous(), "packed bytes")
    require(len(scale) == groups and scale.is_contiguous(), "a scale for each group")
    if zero is not None:
        require(zero.dtype == torch.uint8 and zero.shape == scale.shape, "zero points like scales")
        require(zero.is_contiguous(), "zero points side by side")


def require(holds: bool, what: str) -> None:
    """The library cannot check what lies behind a pointer."""
    if not holds:
        raise ValueError(f"compiled kernels expected {what}, found another tensor")


def kernels() -> Kernels | None:
    """The library, compiled at the first call; None where that is impossible or unwanted.

    Raises ValueError for a MODELPRESS_CPU that names no level of this processor.
    """
    return _outcome()[0]


@dataclass(frozen=True)
class Operators:
    """The compiled products as torch's operators: operators.cpp. They have no gradients."""

    tiles_matmul: Callable[..., Tensor]
    quads_matmul: Callable[..., Tensor]


# Set when the library is loaded: what reads it is traced by torch.compile, which cannot trace that.
_operators: Operators | None = None


def operators(x: Tensor) -> Operators | None:
    """The products as operators; None where there are none, or x asks for a gradient."""
    return None if x.requires_grad and torch.is_grad_enabled() else _operators


def products(*arguments: object) -> Tensor:
    """An empty product [M, N], for torch.compile: of x [M, K], codes, scale [G, N] and others."""
    x, scale = arguments[0], arguments[2]
    assert isinstance(x, Tensor) and isinstance(scale, Tensor)
    return x.new_empty(x.shape[0], scale.shape[1])


def integer_products(*arguments: object) -> Tensor:
    """The same of values [M, K], scales of tokens, codes, scale [G, N]; the last is the dtype."""
    values, scale, dtype = arguments[0], arguments[3], arguments[-1]
    assert isinstance(values, Tensor) and isinstance(scale, Tensor)
    assert isinstance(dtype, torch.dtype)
    return values.new_empty(values.shape[0], scale.shape[1], dtype=dtype)


def reason() -> str:
    """What runs packed products on this CPU, and why, in words."""
    return _outcome()[1]


def packed_is_faster(device: str | torch.device) -> bool:
    """Whether a model's linears take less time packed than dense on `device`, as far as is known.

    They do on GPUs, and on a CPU but for compiled kernels of an x86 processor without AVX2 (or
    MODELPRESS_CPU=generic), which have no product and sum in one there: figures in docs/kernels.md.
    Raises ValueError as `kernels` does.
    """
    if torch.device(device).type != "cpu":
        return True
    library = kernels()
    return library is None or library.instructions() != BASELINE


@cache
def _outcome() -> tuple[Kernels | None, str]:
    global _operators
    _operators = None
    if os.environ.get("MODELPRESS_NATIVE") == "0":
        return None, "torch's operators: MODELPRESS_NATIVE=0"
    level = cpu_level()
    compiler = find_compiler()
    if compiler is None:
        why = "no C++ compiler was found ($CXX, g++, clang++, c++)"
    else:
        try:
            version = _version(compiler)
            path = compile_library(compiler, version)
            library = load(path)
            kernels = Kernels(library)
            said = f"compiled kernels for {kernels.instructions()}, {version}"
            said += "" if level == "native" else f", MODELPRESS_CPU={level}"
            if hasattr(library, "modelpress_register"):
                _operators = _register(library, f"modelpress_{path.stem.split('-')[1]}")
            else:
                said += ", called by address: torch's headers or its library do not fit them"
            return kernels, said
        except PermissionError as error:
            why = str(error)
        except (OSError, subprocess.SubprocessError) as error:
            why = f"{compiler} failed: {_first_line(error)}"
    warnings.warn(
        f"this CPU works by torch's operators, which are slower than compiled kernels: {why}; "
        f"MODELPRESS_NATIVE=0 makes this a choice",
        RuntimeWarning,
        stacklevel=2,
    )
    return None, f"torch's operators: {why}"


def find_compiler() -> str | None:
    """The path of a C++ compiler: $CXX where it is set, else the first of the usual names."""
    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else ["g++", "clang++", "c++"]
    return next((path for path in map(shutil.which, names) if path), None)


def compile_library(compiler: str, version: str) -> Path:
    """The library for this source, compiler and processor; compiled if the cache has none.

    Its name ends in its own sha256. Raises OSError or subprocess.SubprocessError, PermissionError
    for a library that this user has not compiled.
    """
    flags = (*LEVELS[cpu_level()], *FLAGS, *OPENMP)
    sources = [path.read_text() for path in (*SOURCES, *HEADERS, OPERATORS)]
    facts = [*sources, compiler, version, *flags, _processor(), torch.__version__, *TORCH_FLAGS]
    key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:20]
    folder = cache_directory("native")
    for path in sorted(folder.glob(f"kernels-{key}-*.so")):
        check_file(path, digest=path.stem.rpartition("-")[2])
        return path
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = Path(temporary) / "kernels.so"
        command = [compiler, *flags, "-o", str(built), *map(str, SOURCES)]
        try:
            _compile([*command, str(OPERATORS), *TORCH_FLAGS])
        except subprocess.CalledProcessError:
            _compile(command)  # which says what is wrong, if it is not torch's headers
        built.chmod(0o700)
        path = folder / f"kernels-{key}-{hashlib.sha256(built.read_bytes()).hexdigest()}.so"
        built.replace(path)  # whole or not at all, also if two processes compile at once
    return path


def _compile(command: list[str]) -> None:
    subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMPILE_SECONDS,
    )


def load(path: Path) -> ctypes.CDLL:
    """Loads a compiled library and says what its functions take. Raises OSError."""
    library = ctypes.CDLL(str(path))
    for name, signature in SIGNATURES.items():
        function = getattr(library, f"modelpress_{name}")
        function.argtypes = [TYPES[letter] for letter in signature.replace(" ", "")]
        function.restype = None
    return library


@cache
def _names() -> set[str]:
    """Namespaces of operators that this process has registered."""
    return set()


def _register(library: ctypes.CDLL, name: str) -> Operators:
    """The operators under this name; another copy of the library may have registered them."""
    if name not in _names():
        library.modelpress_register(name.encode())
        torch.library.register_fake(f"{name}::tiles_matmul", products)
        torch.library.register_fake(f"{name}::quads_matmul", integer_products)
        _names().add(name)
    found = getattr(torch.ops, name)
    return Operators(found.tiles_matmul.default, found.quads_matmul.default)


def _version(compiler: str) -> str:
    run = subprocess.run(
        [compiler, "--version"],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
    )
    return run.stdout.splitlines()[0].strip() if run.stdout else compiler


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("flags", "Features", "model name", "CPU part")
    return "".join(dict.fromkeys(line for line in lines if line.startswith(names)))


def _first_line(error: Exception) -> str:
    """What a compiler calls an error, else the first line that it or the exception says."""
    said = str(getattr(error, "stderr", None) or error)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else repr(error))
