"""The measurements as sections of the report, a file each: it measures, and turns its arrays
into panels."""

from collections.abc import Callable, Mapping

from pvm_jax.measure.report.section import Section
from pvm_jax.measure.report.sections.ablations import measure_ablations
from pvm_jax.measure.report.sections.accuracy import measure_accuracy
from pvm_jax.measure.report.sections.cost import measure_cost
from pvm_jax.measure.report.sections.decision import measure_decision
from pvm_jax.measure.report.sections.dependency import measure_dependency
from pvm_jax.measure.report.sections.dilution import measure_dilution
from pvm_jax.measure.report.sections.evidence import measure_evidence
from pvm_jax.measure.report.sections.lens import measure_lens
from pvm_jax.measure.report.sections.looked import measure_looks
from pvm_jax.measure.report.sections.midway import measure_midway
from pvm_jax.measure.report.sections.samples import sample_answers
from pvm_jax.measure.report.task import Models, Task

MEASUREMENTS: Mapping[str, Callable[[Models, Task], Section]] = {
    "dilution": measure_dilution,
    "accuracy": measure_accuracy,
    "samples": sample_answers,
    "lens": measure_lens,
    "looked": measure_looks,
    "ablations": measure_ablations,
    "dependency": measure_dependency,
    "midway": measure_midway,
    "decision": measure_decision,
    "evidence": measure_evidence,
    "cost": measure_cost,
}
"""By the name that `--only` takes, in the report's order."""
