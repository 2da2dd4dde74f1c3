"""What a model sees over a long answer: six measurements as arrays, their figures, and the report."""

from pvm_jax.measure.ablations import ablations, by_filler, mislead, silence, with_filler
from pvm_jax.measure.accuracy import TeacherForced, Written, teacher_forced, write
from pvm_jax.measure.cost import Cost, cost
from pvm_jax.measure.dilution import Dilution, dilution
from pvm_jax.measure.lens import Lens, lens
from pvm_jax.measure.looked import Looked, looked
from pvm_jax.measure.report import write_report
from pvm_jax.measure.sections import Section, Task

__all__ = [
    "Cost",
    "Dilution",
    "Lens",
    "Looked",
    "Section",
    "Task",
    "TeacherForced",
    "Written",
    "ablations",
    "by_filler",
    "cost",
    "dilution",
    "lens",
    "looked",
    "mislead",
    "silence",
    "teacher_forced",
    "with_filler",
    "write",
    "write_report",
]
