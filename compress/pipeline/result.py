"""What a run has made when it is done."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.eval.report import format_memory
from compress.eval.shown import Shown, shortened
from compress.pipeline.journal import LayerFacts
from compress.pipeline.plan import Plan
from compress.pipeline.source_check import SourceCheck


@dataclass(repr=False)
class RunResult(Shown):
    """What a run has made.

    Attributes:
        path: the output folder.
        plan: what was planned, and done.
        metrics: the evaluation, as `compress.evaluate` gives it; empty if the recipe asks for none.
        layers: what became of each decoder layer and, if it is quantised, of the head.
        seconds: by stage.
        peak_memory: {"host", "device"} in bytes, of this process, up to the written result.
        self_check: the logits' largest difference after reloading in a fresh process.
        source_check: how far our 16-bit forward of the source is from that of transformers.
        pruning: the strategy of a checkpoint that prunes visual tokens, what it kept of the
            calibration prompts, and how it was searched; None for others.
        warnings: all that was out of the ordinary, one line each.
        report: the HTML page.
        evaluation_memory: `peak_memory` up to the end of the evaluation; empty without one.
    """

    path: Path
    plan: Plan
    metrics: dict[str, Any]
    layers: list[LayerFacts]
    seconds: dict[str, float]
    peak_memory: dict[str, int]
    self_check: dict[str, Any]
    source_check: SourceCheck = field(default_factory=SourceCheck)
    pruning: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    report: Path | None = None
    evaluation_memory: dict[str, int] = field(default_factory=dict)

    @property
    def rounded_to_nearest(self) -> int:
        """Linears whose solution was worse than rounding to nearest, which took its place."""
        modules = (module for layer in self.layers for module in layer["modules"])
        return sum(module.get("rounded_to_nearest", False) for module in modules)

    def memory_line(self) -> str:
        """The peak, and the one of the evaluation where that is higher."""
        line, evaluated = format_memory(self.peak_memory), self.evaluation_memory
        if any(evaluated[name] > peak for name, peak in self.peak_memory.items() if evaluated):
            line += f"; with the evaluation {format_memory(evaluated)}"
        return line

    def summary(self) -> dict[str, str]:
        """What a person wants to know first, as `repr` has it; lists are cut."""
        planned = self.plan.summary()
        said = [self.metrics[key]["line"] for key in ("perplexity", "kl") if key in self.metrics]
        return {
            "path": str(self.path),
            "bytes": planned["bytes"],
            "average bits": planned["average bits"],
            "measured": shortened(said),
            "seconds": f"{sum(self.seconds.values()):.1f}",
            "peak memory": self.memory_line(),
            "warnings": shortened(self.warnings),
            "report": "none" if self.report is None else str(self.report),
        }

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "path": str(self.path),
            "plan": self.plan.as_dict(),
            "metrics": self.metrics,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "evaluation_memory": self.evaluation_memory,
            "self_check": self.self_check,
            "source_check": self.source_check,
            "pruning": self.pruning,
            "layers": self.layers,
            "warnings": self.warnings,
            "report": None if self.report is None else str(self.report),
        }
