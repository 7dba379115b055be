"""What a monitor reads at /metrics, and `breakdown` at /trace."""

from llm_serving.metrics.registry import (
    CONTENT_TYPE,
    FINISHED_REASONS,
    REQUEST_STAGES,
    Metrics,
    Stats,
)
from llm_serving.metrics.steps import MAX_TRACE_STEPS, StepMetrics

__all__ = [
    "CONTENT_TYPE",
    "FINISHED_REASONS",
    "MAX_TRACE_STEPS",
    "REQUEST_STAGES",
    "Metrics",
    "Stats",
    "StepMetrics",
]
